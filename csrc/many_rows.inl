// Many rows: W is packed for a block of tokens, which stays in a thread's second-level cache, and multiplied by all rows.
// Blocks are chosen as by Goto and van de Geijn (2008), "Anatomy of high-performance matrix multiplication".
//
// Included once for each leaf, by walk.inl.

constexpr int64_t kGroupRows = Leaf::kRows * std::max<int64_t>(1, 24 / Leaf::kRows);  // whose logits are in the buffer

// x in words, rows padded with zeros to the leaf's and to whole vectors.
struct ManyRows {
  int64_t depth, stride, apart;  // words of a row, from one row to the next, and from one part to the next
  Room<Word> words;

  // The line between two rows keeps them apart in a cache that they would share a set of, were d_model a power of two.
  explicit ManyRows(const Walk& f)
      : depth(depth_of(f)), stride(depth + kLine / sizeof(Word)), apart(up(f.rows, Leaf::kRows) * stride),
        words(f.parts * apart) {}

  void pack(const Walk& f, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const bool exists = row < f.rows;
      widen_row(f.x + exists * row * f.x_stride, exists * f.d_model, stride, words.start + row * stride, f.parts, apart);
    }
  }
};

static inline void walk_tokens(const Walk& f, const ManyRows& x, const Found& found, int64_t first, int64_t last) {
  const int64_t block = block_of(f), deep = deep_of(x.depth), apart = block * x.depth;
  const Room<Word> packed(f.parts * apart);
  const Room<float> room(kGroupRows * block);
  const Leaf leaf;
  for (int64_t token = first; token < last; token += block) {
    const int64_t past = std::min(token + block, last), width = past - token;
    pack(f, x.depth, token, past, packed.start, apart);
    for (int64_t group = 0; group < f.rows; group += kGroupRows) {
      const int64_t rows = std::min(kGroupRows, f.rows - group);
      for (int64_t k = 0; k == 0 || k < x.depth; k += deep) {  // of no words the sum is 0
        for (int64_t j = 0; j < width; j += Leaf::kTokens) {
          for (int64_t i = 0; i < rows; i += Leaf::kRows) {
            leaf.multiply(
                {x.words.start + (group + i) * x.stride + k, x.stride, x.apart,
                 packed.start + j * x.depth + k * Leaf::kTokens, apart, std::min(deep, x.depth - k), f.parts, f.most,
                 room.start + i * block + j, block, k == 0});
          }
        }
      }
      meet(f, found, group, rows, token, width, room.start, block);
    }
  }
}
