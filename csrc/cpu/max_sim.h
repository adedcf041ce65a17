// Late interaction: for each query and document the sum, over the query's tokens, of the largest
// product with a token of the document.
#pragma once

#include "token_sets.h"

namespace ck {

template <class T>
struct MaxSimArguments {
  TokenSets queries, documents;
  int64_t own = 0;    // each query has so many of the documents for itself; 0: all share them
  T temperature = 0;  // of the smooth maximum, temperature logsumexp(z / temperature); 0: none
  bool normalize = false;
  bool zeros = false;  // tokens of documents that do not count have the product 0; not if smooth

  bool smooth() const { return temperature > 0; }
  // the scores of a query
  int64_t slots() const { return own > 0 ? own : documents.sets; }
  int64_t document(int64_t query, int64_t slot) const {
    return own > 0 ? query * own + slot : slot;
  }
};

// What the forward leaves to the backward, (slots, tokens of the queries): the token of the largest
// product, -1 where there is none, or of the smooth maximum logsumexp(z / temperature).
template <class T>
struct MaxSimState {
  int32_t* winners = nullptr;
  T* lse = nullptr;
};

// scores: (queries, slots). A document without tokens has -inf, a query without tokens 0.
template <class T>
void max_sim(const MaxSimArguments<T>& arguments, const MaxSimState<T>& state, T* scores);

// dx and dy: the gradients of all tokens, in their dtypes, one row after the other; null: not
// needed. dx is 0 already where a token does not count. What the gradient 0 meets is not read.
template <class T>
void max_sim_backward(const MaxSimArguments<T>& arguments, const MaxSimState<T>& state,
                      const T* grad, void* dx, void* dy);

}  // namespace ck
