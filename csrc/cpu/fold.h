// The folds: what a sweep over a row of logits z keeps, and the coefficients its backward needs.
//
// Each fold is init / push / merge / done and a coefficient dL/dz. `V` is a value: one float or
// double (merging) or a vector of them (tiles); `Math` brings exp and log1p for it. No torch here,
// and nothing that a CUDA compiler would refuse, which a test holds it to. The Triton kernels have
// the same formulas in triton/folds.py.
#pragma once

#ifdef __CUDACC__
#define CK_FOLD __host__ __device__ __forceinline__
#else
#define CK_FOLD inline __attribute__((always_inline))
#endif

namespace ck {

// sum_j exp(z_j - shift) and, for the mean, sum_j exp(z_j - shift) (z_j - shift). Any shift gives
// the same lse = shift + log(sum) and mean = shift + weighted / sum; it must only keep the
// exponentials within range. Near the logits that count, a mean keeps digits that they have not.
template <class V>
struct SoftmaxState {
  V sum;
  V weighted;
};

template <bool WithMean>
struct SoftmaxFold {
  template <class V>
  static CK_FOLD SoftmaxState<V> init() {
    return {V{}, V{}};
  }

  // weight = exp(above) of above = z - shift, or 0 for a dropped pair
  template <class V>
  static CK_FOLD void push(SoftmaxState<V>& state, V weight, V above) {
    state.sum += weight;
    // a pair of weight 0 may have z = -inf
    if constexpr (WithMean) state.weighted += weight == V{} ? V{} : weight * above;
  }

  // other's terms, brought from its shift to ours: by = other shift - our shift, factor = exp(by)
  template <class V>
  static CK_FOLD void merge(SoftmaxState<V>& state, const SoftmaxState<V>& other, V by, V factor) {
    state.sum += other.sum * factor;
    // without a pair its shift may be -inf
    if constexpr (WithMean)
      state.weighted += other.sum == V{} ? V{} : (other.weighted + by * other.sum) * factor;
  }

  // less the shift
  template <class V>
  static CK_FOLD V mean(const SoftmaxState<V>& state) {
    return state.weighted / state.sum;
  }
};

// dL/dz of one pair from gradients of lse (a) and of mean (b): p (a + b (z - mean + 1))
template <bool WithMean, class V>
CK_FOLD V softmax_coefficient(V p, V z, V mean, V a, V b) {
  if constexpr (WithMean) return p == V{} ? V{} : p * (a + b * (z - mean + 1));
  return p * a;
}

// log(1 + exp(z)), accurate for both signs of z
template <class Math, class V>
CK_FOLD V softplus(V z) {
  const V magnitude = z < 0 ? -z : z;
  const V positive = z < 0 ? V{} : z;
  return positive + Math::log1p(Math::exp(-magnitude));
}

// d softplus / dz
template <class Math, class V>
CK_FOLD V sigmoid(V z) {
  const V magnitude = z < 0 ? -z : z;
  const V e = Math::exp(-magnitude);
  return (z < 0 ? e : V{} + 1) / (1 + e);
}

}  // namespace ck
