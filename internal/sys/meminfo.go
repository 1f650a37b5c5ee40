package sys

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// Memory is how many bytes of RAM the machine has, and how many the kernel could
// give to new processes without swapping: MemTotal and MemAvailable of
// proc_meminfo(5).
func Memory() (total, available int64, err error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	return ParseMeminfo(text)
}

// ParseMeminfo reads the format of /proc/meminfo.
func ParseMeminfo(text []byte) (total, available int64, err error) {
	found := make(map[string]int64)
	for line := range bytes.Lines(text) {
		f := bytes.Fields(line)
		if len(f) != 3 || string(f[2]) != "kB" {
			continue
		}
		name := string(f[0])
		if name != "MemTotal:" && name != "MemAvailable:" {
			continue
		}
		kib, err := strconv.ParseInt(string(f[1]), 10, 53)
		if err != nil {
			return 0, 0, fmt.Errorf("/proc/meminfo: %s %w", name, err)
		}
		found[name] = kib << 10
	}
	for _, name := range []string{"MemTotal:", "MemAvailable:"} {
		if _, ok := found[name]; !ok {
			return 0, 0, fmt.Errorf("/proc/meminfo: no %s", name[:len(name)-1])
		}
	}
	return found["MemTotal:"], found["MemAvailable:"], nil
}
