package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// memAvailable is how many bytes the kernel could give to new processes
// without swapping, proc_meminfo(5).
func memAvailable() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return parseMemAvailable(b)
}

func parseMemAvailable(meminfo []byte) (int64, error) {
	for line := range bytes.Lines(meminfo) {
		f := bytes.Fields(line)
		if len(f) != 3 || string(f[0]) != "MemAvailable:" || string(f[2]) != "kB" {
			continue
		}
		kib, err := strconv.ParseInt(string(f[1]), 10, 53)
		if err != nil {
			return 0, fmt.Errorf("/proc/meminfo: MemAvailable: %w", err)
		}
		return kib << 10, nil
	}
	return 0, errors.New("/proc/meminfo: no MemAvailable")
}
