// Few rows change places with the tokens: what is packed, once, is x, and W is read where it lies, or widened a few tokens
// at a time. Packing W would cost more than so few products with it. So of a Block x is W, and w is x.
//
// Included once for each leaf, by walk.inl; a template, for not every leaf has this (kFew).

// x in words, padded with zeros: [panels, depth, vectors of rows].
template <typename Leaf>
struct FewRows {
  int64_t vectors, depth, panels;
  Room<Word> words;

  explicit FewRows(const Walk& f)
      : vectors(f.rows <= kLanes ? 1 : 2), depth(depth_of(f)), panels((f.rows + Leaf::kTokens - 1) / Leaf::kTokens),
        words(panels * depth * width()) {
    for (int64_t row = 0; row < panels * width(); row += kLanes) {
      const float* const x = f.x + std::min(row, f.rows - 1) * f.x_stride;
      Word* const to = words.start + row / width() * depth * width() + row % width();
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int64_t numbers = k * kNumbers;
        pack_edge(x + numbers, f.x_stride, f.rows - row, f.d_model - numbers, to + k * width(), width());
      }
    }
  }

  int64_t width() const { return vectors * kLanes; }
};

// Tokens whose products with all rows are there: those of a block, and those that were multiplied with its last.
template <typename Leaf>
constexpr int64_t kTurned = kMostTokens + 2 * Leaf::kRows;

// Products of some tokens with rows, [tokens, kTokens], become those of the rows, [rows, kMostTokens].
template <typename Leaf>
static inline void turn_back(const float* from, int64_t tokens, int64_t rows, float* to) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t token = 0; token < tokens; token += kLanes) {
      Floats square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) square[i] = load(from + (token + i) * Leaf::kTokens + row, kLanes);
      store_transposed(square, to + row * kMostTokens + token, kMostTokens);
    }
  }
}

// Some tokens' products with all rows, of some of their words.
template <typename Leaf, typename Number>
static inline void multiply_panels(const FewRows<Leaf>& x, int64_t tokens, Block<Word, Number> product) {
  for (int64_t panel = 0; panel < x.panels; ++panel) {
    if (x.vectors == 2) {
      if constexpr (std::is_same_v<Number, Word>) Leaf::multiply(product);
    } else if (tokens == Leaf::kRows) {
      Leaf::template multiply<1>(product);
    } else {
      Leaf::template multiply<1, 2 * Leaf::kRows>(product);
    }
    product.w += x.depth * x.width();
    product.z += kTurned<Leaf> * Leaf::kTokens;
    product.next.start = nullptr;
  }
}

template <typename Weight, typename Leaf>
static inline void walk_tokens(
    const Walk& f, const FewRows<Leaf>& x, const Found& found, int64_t first, int64_t last) {
  constexpr int64_t kSize = sizeof(Weight);
  // What the leaf reads of W as it lies in memory; else, and where W ends, some tokens' words are made first.
  constexpr bool kReads = !std::is_same_v<Weight, Half> && (kNumbers == 1 || kSize < sizeof(Word));
  using Read = std::conditional_t<kReads && kNumbers == 1, Weight, Word>;
  const bool aligned = f.w_stride % kNumbers == 0 && reinterpret_cast<uintptr_t>(f.w) % sizeof(Read) == 0;
  const bool reads = kReads && aligned && f.d_model * kSize % sizeof(Word) == 0 &&
                     (std::is_same_v<Read, Word> || x.vectors == 1);
  const int64_t deep = deep_of(x.depth), made_stride = deep + kLine / sizeof(Word);
  // Tokens that lie so share a set of the first-level cache, which holds some eight lines: fewer at once, and none asked
  // for.
  const bool crowded = f.w_stride * kSize % 2048 == 0;
  const int64_t at_once = x.vectors == 1 && !crowded ? 2 * Leaf::kRows : Leaf::kRows;
  // As of many rows, for what is found is summed a block at a time. W^T p is read and written once a block.
  const int64_t block = f.found.u ? kMostTokens : block_of(f);
  const Room<Word> made(at_once * made_stride);
  const Room<float> turned(x.panels * kTurned<Leaf> * Leaf::kTokens), room(Leaf::kTokens * kMostTokens);
  int64_t token = first, held = 0;  // tokens whose products are in `turned`
  for (int64_t some = first; some < last; some += at_once) {
    const Weight* const w = static_cast<const Weight*>(f.w) + some * f.w_stride;
    const bool all_read = reads && some + at_once <= f.tokens;
    const int64_t depth = all_read ? f.d_model / kNumbers : x.depth;
    const Weight* const ahead = !crowded && some + 2 * at_once <= f.tokens ? w + at_once * f.w_stride : nullptr;
    for (int64_t k = 0; k == 0 || k < depth; k += deep) {  // of no words the sum is 0
      const int64_t words = std::min(deep, depth - k);
      const Ahead next{ahead ? ahead + k * kNumbers : nullptr, f.w_stride * kSize, kNumbers * kSize};
      const Word* const factors = x.words.start + k * x.width();
      float* const z = turned.start + held * Leaf::kTokens;
      const auto multiply = [&]<typename Number>(const Number* from, int64_t stride) {
        multiply_panels<Leaf, Number>(
            x, at_once, {from, stride, 0, factors, 0, words, 1, 0, z, Leaf::kTokens, k == 0, next});
      };
      if (all_read) {
        multiply(reinterpret_cast<const Read*>(w) + k, f.w_stride / kNumbers);
        continue;
      }
      for (int64_t i = 0; i < at_once; ++i) {
        const bool exists = some + i < f.tokens;
        widen_row(
            w + exists * (i * f.w_stride + k * kNumbers), exists * (f.d_model - k * kNumbers), words,
            made.start + i * made_stride);
      }
      multiply(static_cast<const Word*>(made.start), made_stride);
    }
    held = std::min(held + at_once, last - token);
    while (held >= block || (held && token + held == last)) {
      const int64_t width = std::min(block, held);
      held -= width;
      for (int64_t row = 0; row < f.rows; row += Leaf::kTokens) {
        const int64_t rows = std::min(Leaf::kTokens, f.rows - row);
        float* const panel = turned.start + row * kTurned<Leaf>;
        turn_back<Leaf>(panel, width, rows, room.start);
        meet(f, found, row, rows, token, width, room.start, kMostTokens);
        std::memmove(panel, panel + width * Leaf::kTokens, sizeof(float) * held * Leaf::kTokens);
      }
      token += width;
    }
  }
}

template <typename Leaf>
static inline void walk_tokens(
    const Walk& f, const FewRows<Leaf>& x, const Found& found, int64_t first, int64_t last) {
  switch (f.kind) {
    case Kind::kFloat: return walk_tokens<float>(f, x, found, first, last);
    case Kind::kBf16: return walk_tokens<Bf16>(f, x, found, first, last);
    case Kind::kHalf: return walk_tokens<Half>(f, x, found, first, last);
  }
}
