// Products of pairs of bfloat16 numbers and how their operands are made, for the kernels of
// KERNELS. With an argument: executes one product and is done, which shows whether the processor
// can.
#include KERNELS

#include <limits>
#include <utility>

#include "check.h"

static float widened(uint32_t bits) {
  const uint32_t word = bits << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

static uint32_t bits_of(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  return word;
}

// the nearer of the two bfloat16 numbers around `value`, the even one halfway
static bool is_nearest(uint16_t got, float value) {
  if (value != value) return std::isnan(widened(got));
  const uint32_t low = bits_of(value) >> 16;  // towards zero
  const double whole = std::abs(double(value)), below = std::abs(double(widened(low)));
  const double step = 2 * (below - std::abs(double(widened(low - 1))));
  const bool infinite = std::isinf(widened(low + 1));
  const double above = infinite ? below + step / 2 : std::abs(double(widened(low + 1)));
  const double middle = (below + above) / 2;
  const bool up = std::isfinite(value) && (whole > middle || (whole == middle && low % 2 == 1));
  return got == low + up;
}

static void check_rounding(const ck::BFloat16Kernels& kernels) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const float special[] = {0.f,    -0.f,  inf,     -inf,        nan,         -nan,
                           1e-41f, 3e38f, 3.4e38f, 1.00390625f, 1.01171875f, widened(0x7f80) - 0};
  const int rows = 64;
  for (int keys : {1, 2, 15, 16, 17, 40}) {
    const int64_t ld = rows + 16, ld_out = (keys + 31) / 32 * 32;
    for (bool at_end : {false, true}) {
      Guarded<float> tile((keys - 1) * ld + rows, at_end);
      Guarded<uint16_t> out((keys - 1) * ld + rows, at_end), turned(rows * ld_out, at_end);
      tile.fill_random();
      for (int i = 0; i < 12; ++i) tile[i * 5] = special[i];
      const uint32_t signalling = 0xff800001u;
      std::memcpy(&tile[63], &signalling, sizeof(signalling));
      kernels.round(tile.data(), ld, keys, rows, out.data(), ld);
      kernels.round_transposed(tile.data(), ld, keys, rows, turned.data(), ld_out);
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < ld_out; ++j) {
          const uint16_t got = turned[i * ld_out + j];
          expect(j < keys ? is_nearest(got, tile[j * ld + i]) && got == out[j * ld + i] : got == 0,
                 "rounding", rows, keys, 0);
        }
    }
  }
  for (int rows_of_x : {1, 2, 7, 8})
    for (int n : {1, 8, 15, 33})
      for (bool at_end : {false, true}) {
        const int stride = n + 3, pairs = (rows_of_x + 1) / 2, ld = n + 5;
        Guarded<uint16_t> x((rows_of_x - 1) * stride + n, at_end);
        Guarded<uint32_t> out((pairs - 1) * ld + n, at_end);
        for (int64_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(generator());
        kernels.pair_rows(x.data(), stride, rows_of_x, n, out.data(), ld);
        for (int i = 0; i < 2 * pairs; ++i)
          for (int j = 0; j < n; ++j)
            expect((out[i / 2 * ld + j] >> 16 * (i % 2) & 0xffff) ==
                       (i < rows_of_x ? x[i * stride + j] : 0u),
                   "pairs", rows_of_x, n, 0);
      }
}

int main(int count, char**) {
  const ck::BFloat16Kernels& kernels = ck::CK_ISA::table();
  const auto multiply = [&](int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t a_row,
                            int64_t a_col, const uint32_t* b, int64_t b_row, int64_t b_panel,
                            float* c, int64_t c_row, int64_t c_panel, bool add) {
    kernels.multiply(m, n, k, {a, a_row, a_col}, {b, b_row, b_panel}, {c, c_row, c_panel}, add);
#ifdef CK_TILES
    expect(ck::tiles_in_use == 0, "tiles kept", m, n, k);
#endif
  };
  const auto fill = [](auto& terms) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < terms.size(); ++i)
      terms[i] = bits_of(uniform(generator)) >> 16 | (bits_of(uniform(generator)) & 0xffff0000u);
  };
  const auto product = [](uint32_t a, uint32_t b) {
    const double low = double(widened(a)) * widened(b);
    const double high = double(widened(a >> 16)) * widened(b >> 16);
    return std::pair(low + high, std::abs(low) + std::abs(high));
  };
  const auto check_one = [&](int64_t m, int64_t n, int64_t k, auto... layout) {
    check<float, uint32_t>(m, n, k, layout..., 2 * std::numeric_limits<float>::epsilon(), fill,
                           product, multiply);
  };
  if (count > 1) return check_one(1, 1, 1, false, false, false, false), 0;
  for_shapes(false, check_one);
  check_rounding(kernels);
  std::puts("ok");
}
