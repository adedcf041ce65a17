// Eigenvalues and eigenvectors of symmetric matrices, for the instruction set that tile.cpp is
// compiled for: Householder's tridiagonal form, then implicit QL steps.
//
// Rows are padded with zeros to whole vectors. A row is taken from the vector on that holds the
// first entry that counts: what lies before it meets a 0 of the other operand.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"
#include "tile.h"

namespace ck {
namespace CK_ISA {
namespace {

template <class T>
constexpr double kEpsilon = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
constexpr int kTogether = 4;  // rows that share the loads of a vector

// calls run(first row, how many at once) for rows begin to end
template <class Run>
CK_FOLD void for_rows(int64_t begin, int64_t end, Run run) {
  for (; begin + kTogether <= end; begin += kTogether)
    run(begin, std::integral_constant<int, kTogether>{});
  for (; begin < end; ++begin) run(begin, std::integral_constant<int, 1>{});
}

// <x, y> from index `first` on
template <class T>
CK_FOLD T dot_from(int64_t first, int64_t ld, const T* x, const T* y) {
  Vec<T> sum{};
  for (int64_t j = first; j < ld; j += kLanes<T>) sum += load<Vec<T>>(x + j) * load<Vec<T>>(y + j);
  return sum_lanes<T>(sum);
}

// R rows of a from index `first` on: row_r -= v_r w + w_r v, then out += next_r row_r
template <class T, int R>
CK_FOLD void update(int64_t first, int64_t ld, T* a, const T* v, const T* w, const T* v_r,
                    const T* w_r, const T* next_r, T* out) {
  for (int64_t j = first; j < ld; j += kLanes<T>) {
    const Vec<T> vj = load<Vec<T>>(v + j), wj = load<Vec<T>>(w + j);
    Vec<T> sum = load<Vec<T>>(out + j);
    for (int r = 0; r < R; ++r) {
      const Vec<T> entry = load<Vec<T>>(a + r * ld + j) - v_r[r] * wj - w_r[r] * vj;
      store(a + r * ld + j, entry);
      sum += next_r[r] * entry;
    }
    store(out + j, sum);
  }
}

// R rows of q from index `first` on: row_r -= v_r t, then out += next_r row_r
template <class T, int R>
CK_FOLD void reflect(int64_t first, int64_t ld, T* q, const T* t, const T* v_r, const T* next_r,
                     T* out) {
  for (int64_t j = first; j < ld; j += kLanes<T>) {
    const Vec<T> tj = load<Vec<T>>(t + j);
    Vec<T> sum = load<Vec<T>>(out + j);
    for (int r = 0; r < R; ++r) {
      const Vec<T> entry = load<Vec<T>>(q + r * ld + j) - v_r[r] * tj;
      store(q + r * ld + j, entry);
      sum += next_r[r] * entry;
    }
    store(out + j, sum);
  }
}

// Takes x, from index `begin` on, to (edge, 0, 0 ...) by I - scale v v^T, and becomes v with
// v_begin = 1 and zeros before. Returns {edge, scale}.
template <class T>
std::pair<double, T> make_reflection(int64_t begin, int64_t ld, T* x) {
  const double first = x[begin];
  for (int64_t j = 0; j <= begin; ++j) x[j] = 0;
  const double square = dot_from(0, ld, x, x);
  double edge = first;
  T scale = 0;
  if (square > 0) {
    const double norm = __builtin_sqrt(first * first + square);
    edge = first > 0 ? -norm : norm;
    scale = static_cast<T>((edge - first) / edge);
    const T factor = static_cast<T>(1 / (first - edge));
    for (int64_t j = 0; j < ld; ++j) x[j] *= factor;
  }
  x[begin] = 1;
  return {edge, scale};
}

// a (d, ld) = Q T Q^T: T's diagonal and what is beside it; Q^T takes the place of a. The update of
// a by one reflection and the product with the vector of the next are one pass, and so is Q made.
// `q` (d, ld) and `room` (5, ld) are room.
template <class T>
void tridiagonalise(int64_t d, int64_t ld, T* a, double* diagonal, double* beside, T* q, T* room) {
  constexpr int W = kLanes<T>;
  T *v = room, *w = room + ld, *next_v = room + 2 * ld, *next_w = room + 3 * ld;
  T* scales = room + 4 * ld;
  for (int64_t j = 0; j < 5 * ld; ++j) room[j] = 0;
  for (int64_t k = 0; k < d; ++k) {
    T* row = a + k * ld;
    for (int64_t j = 0; j < ld; ++j) row[j] -= v[k] * w[j] + w[k] * v[j];
    diagonal[k] = row[k];
    if (k + 1 == d) break;
    const auto [edge, scale] = make_reflection(k + 1, ld, row);
    beside[k] = edge;
    scales[k] = scale;
    for (int64_t j = 0; j < ld; ++j) next_v[j] = row[j], next_w[j] = 0;
    const int64_t first = (k + 1) / W * W;
    for_rows(k + 1, d, [&](int64_t i, auto rows) {
      update<T, rows>(first, ld, a + i * ld, v, w, v + i, w + i, next_v + i, next_w);
    });
    for (int64_t j = first; j <= k; ++j) next_w[j] = 0;
    const T along = scale / 2 * dot_from(first, ld, next_w, next_v);
    for (int64_t j = first; j < ld; ++j) next_w[j] = scale * (next_w[j] - along * next_v[j]);
    std::swap(v, next_v);
    std::swap(w, next_w);
  }
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < ld; ++j) q[i * ld + j] = i == j;
  T *t = v, *next_t = w;  // scale v^T Q
  for (int64_t j = 0; j < ld; ++j) t[j] = 0;
  for (int64_t k = d - 2; k >= 0; --k) {
    const T *v_k = a + k * ld, *next = a + (k > 0 ? k - 1 : 0) * ld;
    for (int64_t j = 0; j < ld; ++j) next_t[j] = j == k;
    for_rows(k + 1, d, [&](int64_t i, auto rows) {
      reflect<T, rows>((k + 1) / W * W, ld, q + i * ld, t, v_k + i, next + i, next_t);
    });
    for (int64_t j = 0; k > 0 && j < ld; ++j) next_t[j] *= scales[k - 1];
    std::swap(t, next_t);
  }
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) a[i * ld + j] = q[j * ld + i];
}

// rows x and y become c x - s y and s x + c y
template <class T>
CK_FOLD void rotate(int64_t ld, T* x, T* y, T c, T s) {
  for (int64_t j = 0; j < ld; j += kLanes<T>) {
    const Vec<T> xj = load<Vec<T>>(x + j), yj = load<Vec<T>>(y + j);
    store(x + j, c * xj - s * yj);
    store(y + j, s * xj + c * yj);
  }
}

// Takes the tridiagonal matrix to its eigenvalues, one rotation after the other, which turn the
// rows of `vectors` too.
template <class T>
class Diagonalisation {
 public:
  void begin(int64_t d, int64_t ld, double* diagonal, double* beside, T* vectors) {
    d_ = d, ld_ = ld;
    diagonal_ = diagonal, beside_ = beside, vectors_ = vectors;
    low_ = 0, sweeps_ = 0;
    begin_sweep();
  }

  bool running() const { return running_; }

  CK_FOLD void rotate_next() {
    double *a = diagonal_ + at_, *b = beside_ + at_;
    const double f = s_ * b[0], h = c_ * b[0];
    const double r = __builtin_sqrt(f * f + g_ * g_);
    b[1] = r;
    if (r == 0) {  // the matrix falls apart here
      a[1] -= p_;
      beside_[high_] = 0;
      return begin_sweep();
    }
    const double inverse = 1 / r;
    s_ = f * inverse;
    c_ = g_ * inverse;
    g_ = a[1] - p_;
    const double t = (a[0] - g_) * s_ + 2 * c_ * h;
    p_ = s_ * t;
    a[1] = g_ + p_;
    g_ = c_ * t - h;
    T* row = vectors_ + at_ * ld_;
    rotate(ld_, row, row + ld_, static_cast<T>(c_), static_cast<T>(s_));
    if (--at_ >= low_) return;
    diagonal_[low_] -= p_;
    beside_[low_] = g_;
    beside_[high_] = 0;
    begin_sweep();
  }

 private:
  static constexpr int kMaxSweeps = 60;  // for an eigenvalue; two are usual

  void begin_sweep() {
    for (running_ = false; low_ < d_; ++low_, sweeps_ = 0) {
      high_ = low_;
      while (high_ + 1 < d_ && !is_negligible(high_)) ++high_;
      if (high_ > low_) break;
    }
    if (low_ == d_) return;
    if (++sweeps_ > kMaxSweeps) {
      diagonal_[0] = __builtin_nan("");
      return;
    }
    running_ = true;
    const double beside = beside_[low_];
    const double slope = (diagonal_[low_ + 1] - diagonal_[low_]) / (2 * beside);
    const double root = __builtin_sqrt(slope * slope + 1);
    g_ = diagonal_[high_] - diagonal_[low_] + beside / (slope < 0 ? slope - root : slope + root);
    s_ = c_ = 1;
    p_ = 0;
    at_ = high_ - 1;
  }

  bool is_negligible(int64_t k) const {
    const double around = __builtin_fabs(diagonal_[k]) + __builtin_fabs(diagonal_[k + 1]);
    return !(__builtin_fabs(beside_[k]) > kEpsilon<T> * around);
  }

  int64_t d_, ld_;
  double *diagonal_, *beside_;
  T* vectors_;
  int64_t low_, high_, at_;  // the block that a sweep is on, and its row
  int sweeps_;
  bool running_;
  double g_, s_, c_, p_;
};

// The eigenvalues (count, d) of `matrices` (count, d, ld) with entries of at most 1, in any order,
// or NaN for the first; the eigenvectors take their place, as rows. Several matrices take turns,
// since each rotation waits for a square root and a division. `room` (d + 5, ld), `beside`
// (count, d).
template <class T>
void eigen(int count, int64_t d, int64_t ld, T* matrices, double* values, double* beside, T* room) {
  Diagonalisation<T> all[kMatrices];
  for (int i = 0; i < count; ++i) {
    T* a = matrices + i * d * ld;
    tridiagonalise(d, ld, a, values + i * d, beside + i * d, room, room + d * ld);
    all[i].begin(d, ld, values + i * d, beside + i * d, a);
  }
  for (bool running = true; running;) {
    running = false;
    for (int i = 0; i < count; ++i) {
      if (!all[i].running()) continue;
      all[i].rotate_next();
      running = true;
    }
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
