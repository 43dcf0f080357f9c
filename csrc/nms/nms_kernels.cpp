// Greedy non-maximum suppression with a spatial index of the boxes kept so far.
//
// A box is dropped when a better box that was kept overlaps it by more than the threshold t. The classic algorithm
// compares all pairs: N^2 / 2 tests, 5e7 for 10,000 boxes. Here a box is compared only with kept boxes that can reach
// IoU > t at all. From IoU > t follows, for boxes i and j of widths w (and likewise for heights h):
//     t < w_i / w_j < 1 / t                                  (sizes are alike)
//     |cx_i - cx_j| < (w_i + w_j) / 2 - t max(w_i, w_j)      (centres are near)
// because intersection <= overlap_x * min(h_i, h_j) and union >= max(w_i h_i, w_j h_j). So kept boxes are filed by size
// octave (the exponent of the longer side) and by a grid over their centres whose cells shrink with the octave, and a
// query visits the few cells of the few octaves in reach. Cells are hashed; a collision only adds candidates. A cell
// holds chunks of kLanes boxes in structure-of-arrays form, tested by one short vector sequence.
//
// Bytes: a chunk (5 vectors) for each box kept in the worst case, where no two share a cell. Operations: about 15
// vector instructions a chunk. Small segments and thresholds under 0.1, where the reach is wide, file everything in one
// cell: the classic algorithm, vectorised.
//
// The IoU is computed as torchvision computes it (same operations, same order, no fused multiply-add), and a division
// decides; a multiplication with a margin of 1e-5 only rules out candidates. Coordinates of the index are double and
// its bounds have the same margin, so rounding never hides a box. Where areas are so small that products lose relative
// accuracy (subnormal numbers), the bounds would not hold and there is no index.
#include "nms.h"

#include "../common/simd.h"
#include "box_blocks.h"

namespace fastcv::FASTCV_ISA {
namespace {

constexpr int64_t kIndexFrom = 512;           // kept boxes from which the index pays
constexpr double kIndexMinThreshold = 0.1;  // below, a query reaches too many cells
constexpr double kMargin = 1e-5;
constexpr double kCentreError = 1e-15;  // of a centre computed in double, relative to its distance from the origin
constexpr int kCellsPerOctave = 0;  // log2 of how often an octave's lower size is divided to give the side of a cell

template <class T>
struct alignas(64) Chunk {
  T x1[kLanes<T>], y1[kLanes<T>], x2[kLanes<T>], y2[kLanes<T>], area[kLanes<T>];
  int32_t count, next;
};

template <class T>
constexpr T kSmallestArea = T(sizeof(T) == 8 ? 1e-290 : 1e-30);  // from here on relative rounding errors are bounded

template <class T>
FASTCV_INLINE T area_of(const T* p) {
  return (p[2] - p[0]) * (p[3] - p[1]);
}

// An area that underflows to zero does no harm: such a box overlaps nothing.
template <class T>
bool areas_are_normal(const NmsSegment<T>& s) {
  bool normal = true;
  for (int64_t i = 0; i < s.n; ++i) {
    const T area = area_of(s.boxes + 4 * int64_t(s.order[i]));
    normal &= !(area > 0 && area < kSmallestArea<T>);
  }
  return normal;
}

// floor(log2(x)) of a positive finite double.
FASTCV_INLINE int exponent_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return int((bits >> 52) & 0x7ff) - 1023;
}
FASTCV_INLINE double power_of_two(int e) {
  const uint64_t bits = uint64_t(e + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
FASTCV_INLINE int64_t cell_of(double x, double per_cell) {
  const double cell = __builtin_floor(x * per_cell);
  return cell < -0x1p40 ? -(int64_t(1) << 40) : cell > 0x1p40 ? (int64_t(1) << 40) : int64_t(cell);
}

template <class T>
class KeptBoxes {
 public:
  KeptBoxes(const NmsSegment<T>& s, void* scratch)
      : t_(round_down(s.iou_threshold, T{})),
        t_low_(T(s.iou_threshold * (1 - kMargin))),
        exact_only_(!(s.iou_threshold >= 0)),
        diou_(s.diou),
        indexable_(s.n > kIndexFrom && s.iou_threshold >= kIndexMinThreshold && s.iou_threshold <= 1 &&
                   areas_are_normal(s)),
        reach_(s.iou_threshold * (1 - kMargin)),
        n_(s.n),
        chunks_(static_cast<Chunk<T>*>(scratch)),
        heads_(reinterpret_cast<int32_t*>(chunks_ + chunk_capacity(s.n))) {
    heads_[0] = -1;
  }

  // The list before the index, and in the worst case one chunk for each box.
  static int64_t chunk_capacity(int64_t n) { return n + kIndexFrom / kLanes<T> + 1; }

  static size_t bytes(int64_t n) {
    return size_t(chunk_capacity(n)) * sizeof(Chunk<T>) + size_t(4 * n + 1) * sizeof(int32_t);
  }

  bool suppresses(const Box<T>& b) const {
    if (!indexed_) return suppressed_in(0, b);
    const double w = double(b.x2) - b.x1, h = double(b.y2) - b.y1;
    if (!(w > 0 && h > 0 && double(b.area) <= __DBL_MAX__)) return false;  // overlaps nothing
    const double cx = 0.5 * (double(b.x1) + b.x2), cy = 0.5 * (double(b.y1) + b.y2), longer = w > h ? w : h;
    // A suppressor is most often a near twin: look at home first.
    const int home = exponent_of(longer);
    const double per_cell = power_of_two(kCellsPerOctave - home);
    if (suppressed_in(bucket(home, cell_of(cx, per_cell), cell_of(cy, per_cell)), b)) return true;
    int first = exponent_of(longer * reach_), last = exponent_of(longer / reach_);
    if (first < lowest_) first = lowest_;
    if (last > highest_) last = highest_;
    for (int octave = first; octave <= last; ++octave) {
      if (suppressed_in_octave(octave, b, cx, cy, w, h)) return true;
    }
    return false;
  }

  void add(const Box<T>& b) {
    if (!indexed_) {
      add_to(0, b);
      if (indexable_ && ++listed_ == kIndexFrom) build_index();
      return;
    }
    const double w = double(b.x2) - b.x1, h = double(b.y2) - b.y1;
    if (!(w > 0 && h > 0 && double(b.area) <= __DBL_MAX__)) return;  // overlaps nothing
    const int octave = exponent_of(w > h ? w : h);
    if (octave < lowest_) lowest_ = octave;
    if (octave > highest_) highest_ = octave;
    const double per_cell = power_of_two(kCellsPerOctave - octave);
    const double cx = 0.5 * (double(b.x1) + b.x2), cy = 0.5 * (double(b.y1) + b.y2);
    add_to(bucket(octave, cell_of(cx, per_cell), cell_of(cy, per_cell)), b);
  }

 private:
  // Files the boxes of the one list in cells; the list's chunks stay behind, unused.
  void build_index() {
    const int32_t list = heads_[0];
    int64_t buckets = 1;
    while (buckets < 2 * n_) buckets *= 2;
    mask_ = uint64_t(buckets - 1);
    for (int64_t i = 0; i < buckets; ++i) heads_[i] = -1;
    indexed_ = true;
    for (int32_t c = list; c >= 0; c = chunks_[c].next)
      for (int i = 0; i < chunks_[c].count; ++i)
        add({chunks_[c].x1[i], chunks_[c].y1[i], chunks_[c].x2[i], chunks_[c].y2[i], chunks_[c].area[i]});
  }

  bool suppressed_in_octave(int octave, const Box<T>& b, double cx, double cy, double w, double h) const {
    const double per_cell = power_of_two(kCellsPerOctave - octave), largest = power_of_two(octave + 1);
    const double rx = radius(w, largest) + kCentreError * __builtin_fabs(cx);
    const double ry = radius(h, largest) + kCentreError * __builtin_fabs(cy);
    const int64_t x0 = cell_of(cx - rx, per_cell), x1 = cell_of(cx + rx, per_cell);
    const int64_t y0 = cell_of(cy - ry, per_cell), y1 = cell_of(cy + ry, per_cell);
    for (int64_t y = y0; y <= y1; ++y)
      for (int64_t x = x0; x <= x1; ++x)
        if (suppressed_in(bucket(octave, x, y), b)) return true;
    return false;
  }

  // How far apart centres may be: the largest (w + v) / 2 - t max(w, v) over sides v that the octave can hold.
  double radius(double w, double largest) const {
    double v = reach_ >= 0.5 ? w : w / reach_;
    if (v > largest) v = largest;
    return ((w + v) * 0.5 - reach_ * (w > v ? w : v)) * (1 + kMargin);
  }

  uint64_t bucket(int octave, int64_t x, int64_t y) const {
    const uint64_t key = uint64_t(x) * 0x9E3779B97F4A7C15u ^ uint64_t(y) * 0xC2B2AE3D27D4EB4Fu ^
                         uint64_t(octave) * 0x165667B19E3779F9u;
    return (key ^ (key >> 29) ^ (key >> 43)) & mask_;
  }

  void add_to(uint64_t bucket, const Box<T>& b) {
    int32_t head = heads_[bucket];
    if (head < 0 || chunks_[head].count == kLanes<T>) {
      Chunk<T>& fresh = chunks_[used_];
      memset(&fresh, 0, sizeof fresh);
      for (int i = 0; i < kLanes<T>; ++i) fresh.area[i] = T(__builtin_nan(""));  // comparisons with it are false
      fresh.next = head;
      heads_[bucket] = head = used_++;
    }
    Chunk<T>& chunk = chunks_[head];
    const int i = chunk.count++;
    chunk.x1[i] = b.x1, chunk.y1[i] = b.y1, chunk.x2[i] = b.x2, chunk.y2[i] = b.y2, chunk.area[i] = b.area;
  }

  bool suppressed_in(uint64_t bucket, const Box<T>& b) const {
    using V = Vec<T>;
    const V bx1 = broadcast(b.x1), by1 = broadcast(b.y1), bx2 = broadcast(b.x2), by2 = broadcast(b.y2);
    const V area = broadcast(b.area), zero = V{};
    for (int32_t c = heads_[bucket]; c >= 0; c = chunks_[c].next) {
      const Chunk<T>& chunk = chunks_[c];
      const V x1 = load(chunk.x1), y1 = load(chunk.y1), x2 = load(chunk.x2), y2 = load(chunk.y2);
      const V overlap_x = max(min(x2, bx2) - max(x1, bx1), zero), overlap_y = max(min(y2, by2) - max(y1, by1), zero);
      const V intersection = overlap_x * overlap_y, joint = load(chunk.area) + area - intersection;
      // Not only ">": where the product is subnormal it may be rounded up to the intersection.
      if (!exact_only_ && !any((intersection >= joint * t_low_) & (intersection > zero))) continue;
      V overlap = intersection / joint;
      if (diou_) {
        const V ex = max(x2, bx2) - min(x1, bx1), ey = max(y2, by2) - min(y1, by1);
        const V dx = ((x1 + x2) - (bx1 + bx2)) * T(0.5), dy = ((y1 + y2) - (by1 + by2)) * T(0.5);
        overlap = overlap - (dx * dx + dy * dy) / (ex * ex + ey * ey);
      }
      if (any(overlap > t_)) return true;
    }
    return false;
  }

  const T t_, t_low_;
  const bool exact_only_, diou_, indexable_;
  const double reach_;
  const int64_t n_;
  Chunk<T>* const chunks_;
  int32_t* const heads_;  // first chunk of each cell; of the one list while not indexed
  bool indexed_ = false;
  int64_t listed_ = 0;
  uint64_t mask_ = 0;
  int32_t used_ = 0;
  int lowest_ = 2000, highest_ = -2000;
};

}  // namespace

template <class T>
size_t nms_scratch_bytes(int64_t n) {
  return KeptBoxes<T>::bytes(n);
}

template <class T>
int64_t nms_segment(const NmsSegment<T>& s, void* scratch) {
  KeptBoxes<T> kept(s, scratch);
  int64_t count = 0;
  for (int64_t i = 0; i < s.n; ++i) {
    const T* p = s.boxes + 4 * int64_t(s.order[i]);
    const Box<T> b{p[0], p[1], p[2], p[3], area_of(p)};
    s.keep[i] = count < s.max_keep && !kept.suppresses(b);
    if (s.keep[i]) {
      kept.add(b);
      ++count;
    }
  }
  return count;
}

template <class T>
int64_t select_scores(const T* scores, int64_t n, T threshold, bool inclusive, int32_t* rows) {
  const Vec<T> limit = broadcast(threshold);
  int64_t count = 0, i = 0;
  // Detectors emit millions of scores of which a few in a hundred pass.
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    const Vec<T> score = load(scores + i);
    for (uint32_t bits = lane_bits<T>(inclusive ? score >= limit : score > limit); bits; bits &= bits - 1)
      rows[count++] = int32_t(i + __builtin_ctz(bits));
  }
  for (; i < n; ++i)
    if (inclusive ? scores[i] >= threshold : scores[i] > threshold) rows[count++] = int32_t(i);
  return count;
}

template size_t nms_scratch_bytes<float>(int64_t);
template size_t nms_scratch_bytes<double>(int64_t);
template int64_t nms_segment<float>(const NmsSegment<float>&, void*);
template int64_t nms_segment<double>(const NmsSegment<double>&, void*);
template int64_t select_scores<float>(const float*, int64_t, float, bool, int32_t*);
template int64_t select_scores<double>(const double*, int64_t, double, bool, int32_t*);

}  // namespace fastcv::FASTCV_ISA
