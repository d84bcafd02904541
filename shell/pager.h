// Long texts: through $PAGER, `less -R`, or a page at a time.
#pragma once
#include <string_view>

namespace moe::shell {

/// Writes the text to standard output; where that is a terminal with fewer rows than it needs, page by page. In $PAGER, where
/// set ("cat" for no paging), else in less, else here.
void page(std::string_view text);

}  // namespace moe::shell
