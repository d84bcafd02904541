// The few file operations that writer and reader share.
#pragma once
#include "core/metrics/record.h"

#include <cstdint>
#include <functional>
#include <string>

namespace moe::metrics {

/// Throws moe::Error (io) with the text of `error` (an errno) and a hint.
[[noreturn]] void throw_file_error(const std::string& path, int error);

/// Hands every whole record from `offset` on to `take` and returns the offset after the last. Whatever `take` throws leaves the
/// offset's meaning to the caller: it is called in order and once a record. Throws moe::Error (io, data).
int64_t scan_records(int descriptor, const std::string& path, int64_t offset, const std::function<void(std::string_view payload, int64_t end)>& take);

}  // namespace moe::metrics
