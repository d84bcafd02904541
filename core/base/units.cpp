#include "core/base/units.h"

#include <fmt/format.h>

#include <cmath>

namespace moe {
std::string format_count(double value) {
    double size = std::abs(value);
    if (size >= 1e12) return fmt::format("{:.2f} T", value / 1e12);
    if (size >= 1e9) return fmt::format("{:.{}f} B", value / 1e9, size < 1e11 ? 2 : 1);
    if (size >= 1e6) return fmt::format("{:.1f} M", value / 1e6);
    if (size >= 1e4) return fmt::format("{:.1f} K", value / 1e3);
    return value == std::floor(value) || size >= 100 ? fmt::format("{:.0f}", value) : fmt::format("{:.3g}", value);
}

std::string format_bytes(double bytes) {
    double size = std::abs(bytes);
    if (size >= 0.1 * 0x1p30) return fmt::format("{:.2f} GiB", bytes / 0x1p30);
    if (size >= 0x1p20) return fmt::format("{:.1f} MiB", bytes / 0x1p20);
    if (size >= 0x1p10) return fmt::format("{:.1f} KiB", bytes / 0x1p10);
    return fmt::format("{:.0f} B", bytes);
}

std::string format_secs(double secs) {
    if (!std::isfinite(secs)) return "unknown";
    if (secs < 0.9995) return fmt::format("{:.0f} ms", secs * 1e3);
    if (secs < 59.95) return fmt::format("{:.1f} s", secs);
    auto whole = static_cast<int64_t>(std::llround(secs));
    if (whole < 3600) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
    if (whole < 86400) return fmt::format("{} h {:02} min", whole / 3600, whole / 60 % 60);
    return fmt::format("{} d {:02} h", whole / 86400, whole / 3600 % 24);
}
}  // namespace moe
