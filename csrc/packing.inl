// Rows of x and of W in words, in the order in which a leaf reads them.
//
// Included once for each leaf, by walk.inl.

static inline int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Memory from a line of the cache on, uninitialised.
template <typename T>
struct Room {
  std::unique_ptr<char[]> bytes;
  T* start;
  explicit Room(int64_t count)
      : bytes(new char[count * sizeof(T) + kLine]),
        start(reinterpret_cast<T*>(up(reinterpret_cast<uintptr_t>(bytes.get()), kLine))) {}
};

// How many words a row has, padded to whole vectors.
static inline int64_t depth_of(const Walk& f) { return up((f.d_model + kNumbers - 1) / kNumbers, kLanes); }

// Of how many of them products are summed in registers.
static inline int64_t deep_of(int64_t depth) {
  const int64_t parts = std::max<int64_t>(1, (depth + Leaf::kMostDepth - 1) / Leaf::kMostDepth);
  return std::max(kLanes, up((depth + parts - 1) / parts, kLanes));
}

// How many tokens are a block.
static inline int64_t block_of(const Walk& f) {
  const int64_t words = std::max<int64_t>(1, depth_of(f) * f.parts), fitting = kBlockBytes / (sizeof(Word) * words);
  return std::clamp(fitting / Leaf::kTokens * Leaf::kTokens, Leaf::kTokens, kMostTokens);
}

// `words` words of a row, of whose numbers `left` exist, and zeros.
template <typename Number>
static inline void widen_row(
    const Number* from, int64_t left, int64_t words, Word* to, int64_t parts = 1, int64_t apart = 0) {
  constexpr int64_t kSide = kLanes * kNumbers;
  const auto write = [&](Numbers<Number> numbers, int64_t k) {
    for (int64_t part = 0; part < parts; ++part) {
      const Words next = numbers.next();
      std::memcpy(to + part * apart + k, &next, sizeof next);
    }
  };
  int64_t k = 0;
  for (; k < words && left >= kSide; k += kLanes, from += kSide, left -= kSide) write({from, kSide}, k);
  for (; k < words; k += kLanes, from += left > 0 ? left : 0, left = 0) write({from, left}, k);
}

// How many words of each of `tokens` tokens there are in whole squares.
static inline int64_t whole_words(const Walk& f, int64_t tokens) {
  return tokens < kLanes ? 0 : f.d_model / (kLanes * kNumbers) * kLanes;
}

// The words of tokens `token` to `past`, [tokens / kTokens, depth, kTokens], one part `apart` from the one before.
template <typename Weight>
static inline void pack(const Walk& f, int64_t depth, int64_t token, int64_t past, Word* to, int64_t apart) {
  const int64_t stride = f.w_stride;
  for (; token < past; token += Leaf::kTokens, to += depth * Leaf::kTokens) {
    for (int64_t side = 0; side < Leaf::kTokens; side += kLanes) {
      const int64_t tokens = std::max<int64_t>(0, past - token - side), whole = whole_words(f, tokens);
      const Weight* const w = static_cast<const Weight*>(f.w) + (tokens ? (token + side) * stride : 0);
      const int64_t ahead = token + side + 2 * Leaf::kTokens <= f.tokens ? Leaf::kTokens * stride : 0;
      Word* at = to + side;
      int64_t k = 0;
      for (; k < whole; k += kLanes, at += kLanes * Leaf::kTokens) {
        ask_ahead(w + k * kNumbers, stride, ahead, k);
        pack_square(w + k * kNumbers, stride, at, Leaf::kTokens, f.parts, apart);
      }
      for (; k < depth; k += kLanes, at += kLanes * Leaf::kTokens)
        pack_edge(w + k * kNumbers, stride, tokens, f.d_model - k * kNumbers, at, Leaf::kTokens, f.parts, apart);
    }
  }
}

static inline void pack(const Walk& f, int64_t depth, int64_t token, int64_t past, Word* to, int64_t apart) {
  switch (f.kind) {
    case Kind::kFloat: return pack<float>(f, depth, token, past, to, apart);
    case Kind::kBf16: return pack<Bf16>(f, depth, token, past, to, apart);
    case Kind::kHalf: return pack<Half>(f, depth, token, past, to, apart);
  }
}
