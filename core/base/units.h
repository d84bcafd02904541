// Numbers for people: counts, bytes and times with a fitting unit.
#pragma once
#include <cstdint>
#include <string>

namespace moe {

/// Decimal prefix and three to four digits: 671026404352 → "671.0 B", 97600000 → "97.6 M", 512 → "512". B is 10^9, T is 10^12.
std::string format_count(double value);
/// Binary unit: 665720012 → "0.62 GiB" from 0.1 GiB on, then MiB, KiB, "512 B" below 1 KiB.
std::string format_bytes(double bytes);
/// Seconds: "42 ms", "3.2 s", "2 min 05 s", "1 h 02 min", "3 d 04 h".
std::string format_secs(double secs);

}  // namespace moe
