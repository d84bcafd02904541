// The compiled part of the system's fmt 9 (cmake/MoeBuild.cmake), for files that do not include LibTorch's headers and its fmt 12 (core/tensor/fmt.cpp).
#ifndef FMT_HEADER_ONLY
#include <fmt/format-inl.h>

namespace fmt {
inline namespace v9 {
namespace detail {
template dragonbox::decimal_fp<float> dragonbox::to_decimal(float) noexcept;
template dragonbox::decimal_fp<double> dragonbox::to_decimal(double) noexcept;
template thousands_sep_result<char> thousands_sep_impl(locale_ref);
template char decimal_point_impl(locale_ref);
template void buffer<char>::append(const char*, const char*);
template void vformat_to(buffer<char>&, string_view, format_args, locale_ref);
}  // namespace detail
}  // namespace v9
}  // namespace fmt
#endif
