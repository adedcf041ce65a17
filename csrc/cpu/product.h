// Products of matrices on the calling thread, for the instruction set they are compiled for.
//
// What is multiplied is a term of `Op`: a number, or a pair of bfloat16 numbers (bfloat16.h), whose
// products are added to a sum. An element of c is summed in registers over kTerms terms at a time,
// from the first on, and those sums are added up in c: its bits depend on k alone, not on m, n or
// where the element lies.
#pragma once

#include "simd.h"
#include "tile.h"

namespace ck {
namespace CK_ISA {
namespace {

// how many vectors of sums the registers hold, and how many of them lie side by side
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSumVectors = 24, kSumWidth = 4;
#else
constexpr int kSumVectors = 12, kSumWidth = 2;
#endif
constexpr int kMostSumRows = 8;  // each needs an address

// as many rows of a panel of b as stay in the first-level cache
template <class Term>
constexpr int64_t kTerms = 32768 / (kPanel * sizeof(Term));

template <class T>
struct Numbers {
  using Term = T;
  using Sum = T;
  static CK_FOLD Vec<T> add(Vec<T> sums, Term a, Vec<T> b) { return sums + a * b; }
};

// Some columns of a panel of c, and all that makes them.
template <class Op>
struct Columns {
  using Term = typename Op::Term;
  int64_t terms;
  LeftMatrix<Term> a;
  const Term* b;
  int64_t b_row;
  typename Op::Sum* c;
  int64_t c_row;
  int count;
  bool add;
};

template <class V, class T>
CK_FOLD void put(T* c, V sums, bool add) {
  store(c, add ? load<V>(c) + sums : sums);
}

// visit(piece, first lane) for `count` lanes, fewer than 2 Lanes, in pieces of 2^n lanes
template <class T, int Lanes, class Visit>
CK_FOLD void in_pieces(int count, Visit visit) {
  if constexpr (Lanes > 0) {
    typedef T Piece __attribute__((vector_size(Lanes * sizeof(T))));
    const int first = count & ~(2 * Lanes - 1);
    if ((count & Lanes) != 0) visit(Piece{}, first);
    in_pieces<T, Lanes / 2>(count, visit);
  }
}

// what lies beyond the columns of c stays; called rather than repeated in every block
template <class V, class T>
__attribute__((noinline)) void put_first(int count, T* c, V sums, bool add) {
  T lanes[kLanes<T>];
  store(lanes, sums);
  for (int l = 0; l < count; ++l) c[l] = add ? c[l] + lanes[l] : lanes[l];
}

// M rows and N vectors of c
template <class Op, int M, int N>
void sum_block(const Columns<Op>& o) {
  using T = typename Op::Sum;
  using Term = typename Op::Term;
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  V sums[M][N]{};
  if (o.add) {  // c may be far away
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int q = 0; q < N * W; q += 64 / static_cast<int>(sizeof(T)))
        __builtin_prefetch(o.c + r * o.c_row + q, 1);
  }
  const Term *a = o.a.data, *b = o.b;
  const int64_t a_row = o.a.row, a_col = o.a.col, b_row = o.b_row;
  for (int64_t p = 0; p < o.terms; ++p, a += a_col, b += b_row) {
    V row[N];
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) row[q] = load<V>(b + q * W);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int q = 0; q < N; ++q)
        sums[r][q] = Op::add(sums[r][q], load<Term>(a + r * a_row), row[q]);
  }
  const int last = o.count - (N - 1) * W;  // columns of the last vector
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    T* c = o.c + r * o.c_row;
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q, c += W) {
      if (q < N - 1 || last == W)
        put(c, sums[r][q], o.add);
      else
        put_first(last, c, sums[r][q], o.add);
    }
  }
}

template <class Op, int M, int N>
CK_FOLD void sum_next_rows(Columns<Op>& o) {
  sum_block<Op, M, N>(o);
  o.a.data += M * o.a.row;
  o.c += M * o.c_row;
}

// fewer than 2 M rows, in blocks of 2^n
template <class Op, int M, int N>
CK_FOLD void sum_last_rows(int64_t m, Columns<Op>& o) {
  if constexpr (M > 0) {
    if ((m & M) != 0) sum_next_rows<Op, M, N>(o);
    sum_last_rows<Op, M / 2, N>(m, o);
  }
}

template <class Op, int N>
void sum_rows(int64_t m, Columns<Op> o) {
  constexpr int M = kSumVectors / N < kMostSumRows ? kSumVectors / N : kMostSumRows;
  for (; m >= M; m -= M) sum_next_rows<Op, M, N>(o);
  sum_last_rows<Op, kMostSumRows / 2, N>(m, o);
}

// fewer than 2 N vectors, likewise
template <class Op, int N>
CK_FOLD void sum_vectors(int64_t m, Columns<Op>& o, int vectors) {
  if constexpr (N > 0) {
    if ((vectors & N) != 0) {
      constexpr int kColumns = N * kLanes<typename Op::Sum>;
      Columns<Op> some = o;
      some.count = o.count < kColumns ? o.count : kColumns;
      sum_rows<Op, N>(m, some);
      o.b += kColumns, o.c += kColumns, o.count -= some.count;
    }
    sum_vectors<Op, N / 2>(m, o, vectors);
  }
}

template <class Op>
CK_FOLD void sum_columns(int64_t m, Columns<Op> o) {
  using Term = typename Op::Term;
  using V = Vec<typename Op::Sum>;
  constexpr int W = kLanes<typename Op::Sum>;
  const int vectors = (o.count + W - 1) / W;
  Term copy[kTerms<Term> * kSumWidth * W];
  if (o.count % W != 0) {  // nothing beyond b is read
    Term* to = copy;
    for (int64_t p = 0; p < o.terms; ++p, to += vectors * W) {
      const Term* from = o.b + p * o.b_row;
      for (int q = 0; q < vectors - 1; ++q) store(to + q * W, load<V>(from + q * W));
      const int whole = (vectors - 1) * W;
      store(to + whole, V{});
      in_pieces<Term, W / 2>(o.count - whole, [&](auto piece, int l) {
        store(to + whole + l, load<decltype(piece)>(from + whole + l));
      });
    }
    o.b = copy;
    o.b_row = vectors * W;
  }
  sum_vectors<Op, kSumWidth>(m, o, vectors);
}

template <class Op, class Term = typename Op::Term, class Sum = typename Op::Sum>
void multiply(int64_t m, int64_t n, int64_t k, LeftMatrix<Term> a, PanelMatrix<const Term> b,
              PanelMatrix<Sum> c, bool add) {
  constexpr int64_t kWidth = kSumWidth * kLanes<Sum>;
  constexpr int64_t kMost = kTerms<Term>;
  static_assert(kPanel % kWidth == 0);
  for (int64_t panel = 0; panel * kPanel < n; ++panel) {
    const int64_t left = n - panel * kPanel, width = left < kPanel ? left : kPanel;
    int64_t p = 0;
    do {  // once for k = 0 too
      const int64_t terms = k - p < kMost ? k - p : kMost;
      for (int64_t j = 0; j < width; j += kWidth) {
        const int count = static_cast<int>(width - j < kWidth ? width - j : kWidth);
        sum_columns<Op>(m, {terms,
                            {a.data + p * a.col, a.row, a.col},
                            b.data + panel * b.panel + p * b.row + j,
                            b.row,
                            c.data + panel * c.panel + j,
                            c.row,
                            count,
                            add || p > 0});
      }
      p += terms;
    } while (p < k);
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
