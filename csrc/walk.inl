// The logits of all rows for one token after another, and what becomes of them while they are in the first-level cache.
//
// Threads share out the tokens. Each packs W for a block of them, which stays in its second-level cache, and takes some
// rows at a time: a leaf, of which every generation of processors has one, sums their logits in registers; in a buffer
// that stays in the first-level cache the model's bias, scale and softcap are put to them, and they are added to the
// rows' state or written out. Threads' states merge as those of tiles do. Blocks are chosen as by Goto and van de Geijn
// (2008), "Anatomy of high-performance matrix multiplication". Of few rows W is not packed, but read through registers.
//
// Each logit is summed in one order, wherever its row and its token stand and however many there are.
//
// Included once for each leaf, after it.

constexpr int64_t kGroupRows = Leaf::kRows * std::max<int64_t>(1, 24 / Leaf::kRows);  // whose logits are in the buffer
constexpr int64_t kMostTokens = 128;            // of a block
constexpr int64_t kBlockBytes = 256 * 1024;     // of W in a block, if it is no less than one of the leaf's

static inline int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Memory from a line of the cache on, uninitialised.
template <typename T>
struct Room {
  std::unique_ptr<char[]> bytes;
  T* start;
  explicit Room(int64_t count)
      : bytes(new char[count * sizeof(T) + 64]),
        start(reinterpret_cast<T*>(up(reinterpret_cast<uintptr_t>(bytes.get()), 64))) {}
};

// x in words, rows padded with zeros to the leaf's and to whole vectors.
struct Rows {
  int64_t depth, stride, apart;  // words of a row, from one row to the next, and from one part to the next
  Room<Word> words;

  // The line between two rows keeps them apart in a cache that they would share a set of, were d_model a power of two.
  explicit Rows(const Walk& f)
      : depth(up((f.d_model + kNumbers - 1) / kNumbers, kLanes)), stride(depth + 64 / sizeof(Word)),
        apart(padded(f) * stride), words(f.parts * apart) {}

  static int64_t padded(const Walk& f) { return f.rows <= Leaf::kFew ? Leaf::kFew : up(f.rows, Leaf::kRows); }

  void pack(const Walk& f, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t k = 0; k < stride; k += kLanes) {
        const int64_t left = row < f.rows ? f.d_model - k * kNumbers : 0;
        Numbers<float> numbers(f.x + (left > 0 ? row * f.x_stride + k * kNumbers : 0), left);
        for (int64_t part = 0; part < f.parts; ++part) {
          const Words next = numbers.next();
          std::memcpy(words.start + part * apart + row * stride + k, &next, sizeof next);
        }
      }
    }
  }
};

// How many words of each of `tokens` tokens there are in whole squares, `depth` at most.
static inline int64_t whole_words(const Walk& f, int64_t depth, int64_t tokens) {
  return tokens < kLanes ? 0 : std::min(f.d_model / (kLanes * kNumbers) * kLanes, depth);
}

// The words of tokens `token` to `past`, [tokens / kTokens, depth, kTokens], one part `apart` from the one before.
template <typename Weight>
static inline void pack(const Walk& f, int64_t depth, int64_t token, int64_t past, Word* to, int64_t apart) {
  const int64_t stride = f.w_stride;
  for (; token < past; token += Leaf::kTokens, to += depth * Leaf::kTokens) {
    for (int64_t side = 0; side < Leaf::kTokens; side += kLanes) {
      const int64_t tokens = std::max<int64_t>(0, past - token - side), whole = whole_words(f, depth, tokens);
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

// What the model makes of a row's products.
static inline void transform(const Walk& f, int64_t token, int64_t width, float* z) {
  if (!f.bias && f.scale == 1.0f && f.softcap == 0.0f) return;
  for (int64_t j = 0; j < width; j += kLanes) {
    Floats lanes = load(z + j, kLanes);
    if (f.bias) lanes += load(f.bias + token + j, width - j);
    if (f.scale != 1.0f) lanes *= f.scale;
    if (f.softcap != 0.0f) lanes = f.softcap * tanh(lanes / f.softcap);
    store(z + j, lanes, kLanes);
  }
}

// The products of few rows, for which W is not packed: its words pass through the registers a square at a time.
template <typename Leaf, typename Weight>
static inline void multiply_few(
    const Walk& f, const Rows& x, int64_t deep, int64_t token, int64_t past, float* z, int64_t z_stride) {
  for (; token < past; token += kLanes, z += kLanes) {
    const int64_t tokens = past - token, whole = whole_words(f, x.depth, tokens);
    const Weight* const w = static_cast<const Weight*>(f.w) + token * f.w_stride;
    const int64_t ahead = token + 2 * kLanes <= f.tokens ? kLanes * f.w_stride : 0;
    for (int64_t k = 0; k == 0 || k < x.depth; k += deep) {  // of no words the sum is 0
      Leaf::template multiply_few<Weight>(
          {f.rows, x.words.start + k, x.stride, 0, nullptr, 0, std::min(deep, x.depth - k), 1, 0, z, z_stride, k == 0},
          {w + k * kNumbers, f.w_stride, tokens, f.d_model - k * kNumbers, std::min(whole - k, deep), ahead});
    }
  }
}

// Whether the rows are few enough for that, and so multiplied.
template <typename Leaf>
static inline bool multiplied_few(
    const Walk& f, const Rows& x, int64_t deep, int64_t token, int64_t past, float* z, int64_t z_stride) {
  if constexpr (Leaf::kFew != 0) {
    if (f.rows > Leaf::kFew) return false;
    switch (f.kind) {
      case Kind::kFloat: multiply_few<Leaf, float>(f, x, deep, token, past, z, z_stride); break;
      case Kind::kBf16: multiply_few<Leaf, Bf16>(f, x, deep, token, past, z, z_stride); break;
      case Kind::kHalf: multiply_few<Leaf, Half>(f, x, deep, token, past, z, z_stride); break;
    }
    return true;
  }
  return false;
}

static inline void walk_share(const Walk& f, const Rows& x, const Shares& found, int64_t share) {
  const int64_t panels = (f.tokens + Leaf::kTokens - 1) / Leaf::kTokens;
  const int64_t first = panels * share / f.shares * Leaf::kTokens;
  const int64_t last = std::min(panels * (share + 1) / f.shares * Leaf::kTokens, f.tokens);
  const int64_t words = std::max<int64_t>(1, x.depth * f.parts), fitting = kBlockBytes / (sizeof(Word) * words);
  const int64_t block = std::clamp(fitting / Leaf::kTokens * Leaf::kTokens, Leaf::kTokens, kMostTokens);
  const int64_t parts = std::max<int64_t>(1, (x.depth + Leaf::kMostDepth - 1) / Leaf::kMostDepth);
  const int64_t deep = std::max(kLanes, up((x.depth + parts - 1) / parts, kLanes)), apart = block * x.depth;
  const Room<Word> packed(f.parts * apart);
  const Room<float> room(kGroupRows * block);
  const Leaf leaf;
  for (int64_t token = first; token < last; token += block) {
    const int64_t past = std::min(token + block, last), width = past - token;
    const bool few = multiplied_few<Leaf>(f, x, deep, token, past, room.start, block);
    if (!few) pack(f, x.depth, token, past, packed.start, apart);
    for (int64_t group = 0; group < f.rows; group += kGroupRows) {
      const int64_t rows = std::min(kGroupRows, f.rows - group);
      for (int64_t k = 0; !few && (k == 0 || k < x.depth); k += deep) {  // of no words the sum is 0
        for (int64_t j = 0; j < width; j += Leaf::kTokens) {
          for (int64_t i = 0; i < rows; i += Leaf::kRows) {
            leaf.multiply(
                {std::min(Leaf::kRows, rows - i), x.words.start + (group + i) * x.stride + k, x.stride, x.apart,
                 packed.start + j * x.depth + k * Leaf::kTokens, apart, std::min(deep, x.depth - k), f.parts, f.most,
                 room.start + i * block + j, block, k == 0});
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* const z = room.start + i * block;
        transform(f, token, width, z);
        if (f.found.sums)
          found[share].add(group + i, z, width, token, add_tile);
        else
          std::memcpy(f.z + (group + i) * f.z_stride + token, z, sizeof(float) * width);
      }
    }
  }
}

// `parallel(count, work)` has every number below count in one call work(begin, end).
template <typename Parallel>
void walk(const Walk& f, Parallel parallel) {
  const Rows x(f);
  const Shares found(f);
  parallel(Rows::padded(f), [&](int64_t begin, int64_t end) { x.pack(f, begin, end); });
  parallel(f.shares, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) walk_share(f, x, found, share);
  });
  if (!f.found.sums) return;
  parallel(f.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) found.merge(row);
  });
}
