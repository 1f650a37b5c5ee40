package sys

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ProcStat reads when a process began, in clock ticks since boot, and of one that
// has ended and was not reaped yet, how, from /proc/PID/stat.
func ProcStat(pid int) (start uint64, status unix.WaitStatus, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	return parseStat(string(b))
}

func parseStat(text string) (start uint64, status unix.WaitStatus, err error) {
	// The second field, the command's name in brackets, may hold anything.
	name := strings.LastIndex(text, ") ")
	fields := strings.Fields(text[name+1:])
	if name < 0 || len(fields) < 50 {
		return 0, 0, fmt.Errorf("/proc/PID/stat has %d fields after the name, not 50", len(fields))
	}
	if start, err = strconv.ParseUint(fields[19], 10, 64); err != nil {
		return 0, 0, fmt.Errorf("/proc/PID/stat: start time: %w", err)
	}
	code, err := strconv.ParseUint(fields[49], 10, 32)
	if err != nil {
		return 0, 0, fmt.Errorf("/proc/PID/stat: exit code: %w", err)
	}
	return start, unix.WaitStatus(code), nil
}

// EndOf is how a process ended that is no child of ours: by its pidfd, or from
// what is left of it if its parent has not taken notice yet. It began at start,
// by ProcStat.
func EndOf(pid, pidfd int, start uint64) (unix.WaitStatus, error) {
	ws, err := ExitInfo(pidfd)
	if err == nil {
		return ws, nil
	}
	if now, ws, err := ProcStat(pid); err == nil && now == start {
		return ws, nil
	}
	return ExitInfo(pidfd) // it was reaped just now
}
