"""A program in a pseudo-terminal, and what its screen shows."""
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time


class Screen:
    """The escape sequences that moelab and readline write, on a screen that scrolls."""

    def __init__(self, rows, columns):
        self.rows, self.columns = rows, columns
        self.lines, self.row, self.column = [""], 0, 0  # all lines since the start; row counts in them
        self.state = ""

    def put(self, text):
        for c in text:
            if self.state:
                self.state += c
                self.escape()
            elif c == "\033":
                self.state = c
            elif c == "\r":
                self.column = 0
            elif c == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            elif c == "\t":
                self.column = min(self.columns - 1, self.column // 8 * 8 + 8)
            elif c == "\b":
                self.column = max(0, self.column - 1)
            elif c >= " ":
                if self.column == self.columns:
                    self.column = 0
                    self.put("\n")
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + c + line[self.column + 1 :]
                self.column += 1

    def escape(self):
        s = self.state
        if len(s) == 2:
            if s[1] not in "[]":
                self.state = ""
            return
        if s[1] == "[" and "@" <= s[-1] <= "~":
            numbers = re.sub(r"[^0-9;]", "", s[2:-1]).split(";")
            n = int(numbers[0] or 0)
            if s[-1] == "A":
                self.row = max(0, len(self.lines) - self.rows, self.row - max(n, 1))
            elif s[-1] == "C":
                self.column = min(self.columns - 1, self.column + max(n, 1))
            elif s[-1] in "JK":
                self.lines[self.row] = self.lines[self.row][: self.column]
                if s[-1] == "J":
                    del self.lines[self.row + 1 :]
            self.state = ""
        elif s[1] == "]" and s[-1] == "\a":
            self.state = ""

    def text(self):
        return "\n".join(line.rstrip() for line in self.lines)


class Terminal:
    def __init__(self, words, rows=24, columns=80, environment=None, folder="."):
        self.screen, self.raw, self.mark = Screen(rows, columns), "", 0
        environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **(environment or {})}
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(words[0], words, environment)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.code = None

    def send(self, text):
        os.write(self.file, text.encode())

    def pump(self, secs):
        """Reads what comes within that time; False at the end of the program."""
        ready, _, _ = select.select([self.file], [], [], secs)
        if not ready:
            return True
        try:
            data = os.read(self.file, 65536)
        except OSError:
            return False
        text = data.decode(errors="replace")
        self.raw += text
        self.screen.put(text)
        return bool(data)

    def wait(self, pattern, secs=60):
        """Until the output since the last call matches; gives the match."""
        end = time.monotonic() + secs
        while True:
            found = re.compile(pattern, re.S).search(self.raw, self.mark)
            if found:
                self.mark = found.end()
                return found
            if time.monotonic() > end or not self.pump(min(1, max(0, end - time.monotonic()))):
                raise AssertionError(f"no {pattern!r} in {self.raw[self.mark:][-1500:]!r}")

    def settle(self, secs=0.15):
        """Until nothing came for that time."""
        while True:
            before = len(self.raw)
            if not self.pump(secs) or len(self.raw) == before:
                self.mark = len(self.raw)
                return self.screen.text()

    def wait_exit(self, secs=30):
        end = time.monotonic() + secs
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                while self.pump(0) and select.select([self.file], [], [], 0)[0]:
                    pass
                return self.code
            self.pump(0.05)
        raise AssertionError("the program does not end")

    def close(self):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.file)
