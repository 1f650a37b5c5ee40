package announce

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// TapFDs finds the descriptors by which process pid has the tap open, one for
// each queue, ascending; none is an error. They are numbers in that process:
// pidfd_getfd(2) duplicates them into this one.
func TapFDs(pid int, tap string) ([]int, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fdinfo")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("announce: find tap %s in process %d: %w", tap, pid, err)
	}
	var fds []int
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		is, err := isTap(filepath.Join(dir, e.Name()), tap)
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("announce: find tap %s in process %d: %w", tap, pid, err)
		}
		if is {
			fds = append(fds, fd)
		}
	}
	if len(fds) == 0 {
		return nil, fmt.Errorf("announce: process %d does not have tap %s open", pid, tap)
	}
	slices.Sort(fds)
	return fds, nil
}

// isTap looks for the line "iff:\tNAME" that the tun driver writes.
func isTap(path, tap string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close() // read only
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if name, ok := strings.CutPrefix(lines.Text(), "iff:"); ok {
			return strings.TrimSpace(name) == tap, nil
		}
	}
	return false, lines.Err()
}
