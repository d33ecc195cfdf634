// W a square at a time: as many tokens and words of each as a vector has lanes; and what a leaf is given.
//
// Included once for each instruction set, after words.inl and what its words are.

// Words of kLanes rows of W, a vector of each, transposed: [kLanes, `to_stride`], a word of all rows after another.
template <typename Weight>
INLINED void pack_square(
    const Weight* w, int64_t stride, Word* to, int64_t to_stride, int64_t parts, int64_t apart) {
  Numbers<Weight> numbers[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) numbers[i] = Numbers<Weight>(w + i * stride, kLanes * kNumbers);
  for (int64_t part = 0; part < parts; ++part) {
    Words rows[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = numbers[i].next();
    store_transposed(rows, to + part * apart, to_stride);
  }
}

// The same where W ends: of `tokens` rows, of which `left` numbers exist, and zeros.
template <typename Weight>
[[gnu::noinline]] static void pack_edge(
    const Weight* w, int64_t stride, int64_t tokens, int64_t left, Word* to, int64_t to_stride, int64_t parts = 1,
    int64_t apart = 0) {
  constexpr int64_t kSide = kLanes * kNumbers;
  Weight square[kLanes * kSide] = {};
  for (int64_t i = 0; i < std::min(tokens, kLanes) && left > 0; ++i)
    std::memcpy(square + i * kSide, w + i * stride, sizeof(Weight) * std::min(left, kSide));
  pack_square(square, kSide, to, to_stride, parts, apart);
}

// Has the processor fetch the square that is `ahead` numbers on, if any: it foresees no jump from row to row.
template <typename Weight>
INLINED void ask_ahead(const Weight* w, int64_t stride, int64_t ahead, int64_t k) {
  if (!ahead || k * kNumbers * sizeof(Weight) % kLine) return;  // a line is asked for once
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(w + ahead + i * stride);
}

// Rows that will be read next, of which the processor is asked to fetch a line after another meanwhile.
struct Ahead {
  const void* start = nullptr;  // null: none
  int64_t stride = 0, word = sizeof(float);  // bytes from one row to the next, and of a word
};

// What a leaf multiplies at once: kRows rows times kTokens tokens; or, of few rows, some tokens times kTokens rows.
template <typename Word, typename Number = Word>
struct Block {
  const Number* x;  // words, or numbers that the leaf makes words of
  int64_t x_stride, x_apart;  // from one row to the next, and from one part of the numbers to the next
  const Word* w;              // [depth, kTokens], or [depth, kLanes] of one vector of rows
  int64_t w_apart;
  int64_t depth;
  int64_t parts, most;
  float* z;
  int64_t z_stride;
  bool first;  // else it is added to what is in z
  Ahead next{};
};
