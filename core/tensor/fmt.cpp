// The compiled part of LibTorch's fmt 12, which is what files see that include its headers; core/base/fmt.cpp is that of the others.
#ifndef FMT_HEADER_ONLY
#include <fmt/format-inl.h>

namespace fmt {
inline namespace v12 {
namespace detail {
template dragonbox::decimal_fp<float> dragonbox::to_decimal(float) noexcept;
template dragonbox::decimal_fp<double> dragonbox::to_decimal(double) noexcept;
template thousands_sep_result<char> thousands_sep_impl(locale_ref);
template char decimal_point_impl(locale_ref);
}  // namespace detail
}  // namespace v12
}  // namespace fmt
#endif
