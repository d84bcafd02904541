-- moe.progress(total, options): how far a long job is and how long it will still take.
local WIDTH, LINE_SECS, TERMINAL_SECS = 28, 10, 0.1

local Progress = { __name = "progress" }
Progress.__index = Progress

local function bar(share)
  local full = math.floor(share * WIDTH + 0.5)
  return ("█"):rep(full) .. ("·"):rep(WIDTH - full)
end

local function line(self)
  local share = self.total > 0 and math.min(1, self.count / self.total) or 1
  local elapsed = moe.clock() - self.start
  local left = self.count > 0 and self.count < self.total and "  " .. moe.format_secs(elapsed / self.count * (self.total - self.count)) .. " left" or ""
  if self.finished then left = "  " .. moe.format_secs(elapsed) end
  return ("%s%s %3.0f%%  %d/%d%s%s"):format(self.label, self.terminal and bar(share) or "", 100 * share, math.floor(self.count), self.total, left, self.text ~= "" and "  " .. self.text or "")
end

local function show(self, always)
  local now = moe.clock()
  if not always and now - self.shown < (self.terminal and TERMINAL_SECS or LINE_SECS) then return end
  if not always and not self.terminal and self.count >= self.total then return end      -- done() writes that line
  self.shown = now
  if self.terminal then
    moe.status(self.finished and "" or line(self))
    if self.finished then moe.write(line(self) .. "\n") end
  else
    moe.write(line(self) .. "\n")
  end
end

function Progress:update(count, text)
  self.count, self.text = count, text or self.text
  show(self, false)
  return self
end
moe.document(Progress.update, "progress:update", "p:update(count, text): count (parts of one count too) and a text: shows how far it is: on a terminal one line that is rewritten, else a line every 10 s.")

function Progress:done(text)
  if self.finished then return self end
  self.finished, self.text = true, text or self.text
  show(self, true)
  return self
end
moe.document(Progress.done, "progress:done", "p:done(text): ends the line with the time it took.")

Progress.__methods = { update = Progress.update, done = Progress.done }
moe.document(Progress, "progress", "progress: a line that says how far a long job is.")

local function make(total, options)
  if math.type(total) == nil then moe.fail { op = "moe.progress: total", got = tostring(total), want = "a number" } end
  options = moe.check_keys(options or {}, { "label" }, "moe.progress: options")
  local now = moe.clock()
  return setmetatable({
    total = total, count = 0, text = "", label = options.label and options.label .. " " or "",
    start = now, shown = now - (moe.is_terminal() and TERMINAL_SECS or 0), terminal = moe.is_terminal(), finished = false,
  }, Progress)
end

return moe.document(make, "moe.progress", "moe.progress(total, {label =}): a progress line with the time left: p:update(count, text), p:done(text).\nExample: local p = moe.progress(2, { label = \"files\" }); p:update(1, \"a.txt\"); p:done()")
