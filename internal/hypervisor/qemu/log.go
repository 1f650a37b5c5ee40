package qemu

import (
	"bytes"
	"io"
	"os"
	"strings"
)

// tailBytes is how much of QEMU's words is shown with an error.
const tailBytes = 2048

// logTail is the end of what QEMU wrote from offset on, in one line, without
// its timestamps.
func logTail(path string, offset int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || end <= offset {
		return ""
	}
	from := max(offset, end-tailBytes)
	b := make([]byte, end-from)
	n, err := f.ReadAt(b, from)
	if err != nil && n == 0 {
		return ""
	}
	b = b[:n]
	if from > offset {
		_, b, _ = bytes.Cut(b, []byte("\n"))
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if line = withoutTimestamp(strings.TrimSpace(line)); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}

// withoutTimestamp takes off what -msg timestamp=on puts before a line.
func withoutTimestamp(line string) string {
	stamp, rest, found := strings.Cut(line, " ")
	if found && len(stamp) >= 20 && stamp[4] == '-' && strings.HasSuffix(stamp, "Z") {
		return rest
	}
	return line
}
