// Sweeps over one similarity matrix at several prefixes of the features. Statistics and gradients
// from above are those of forward.h and backward.h for each prefix, one after the other; lse alone,
// or with the softplus fold its sum.
#pragma once

#include <vector>

#include "backward.h"
#include "forward.h"

namespace ck {

// ends: where prefixes end, ascending; the last one is d. Keys are those that all rows share.
template <class T>
std::unique_ptr<Keeper> nested_forward(const PairArguments<T>& arguments,
                                       const std::vector<int64_t>& ends,
                                       const ForwardOptions<T>& options);

// Returns the gradient of the scale.
template <class T>
double nested_backward(const PairArguments<T>& arguments, const std::vector<int64_t>& ends,
                       const BackwardInputs<T>& inputs, const Gradients<T>& to);

}  // namespace ck
