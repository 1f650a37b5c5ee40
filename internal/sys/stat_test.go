package sys

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseStat(t *testing.T) {
	stat := "42 (a) b (c) ) Z 1 42 42 0 -1 4194304 0 0 0 0 0 0 0 0 20 0 1 0 12345 0 0 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 9"
	start, code, err := parseStat(stat)
	if err != nil || start != 12345 || code != 9 {
		t.Errorf("start %d, code %d, %v", start, code, err)
	}
	for _, bad := range []string{"", "1 (a", "1 (a) R 1 2"} {
		if _, _, err := parseStat(bad); err == nil {
			t.Errorf("parseStat(%q) succeeded", bad)
		}
	}
}

// A process that is no child of ours cannot be had here, but one that nobody has
// reaped yet can.
func TestEndOf(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }() // it was killed
	pid := cmd.Process.Pid
	fd, err := OpenPidfd(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	start, _, err := ProcStat(pid)
	if err != nil || start == 0 {
		t.Fatalf("start %d, %v", start, err)
	}
	if err := PidfdSignal(fd, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := WaitPidfd(t.Context(), fd); err != nil {
		t.Fatal(err)
	}
	if ws, err := EndOf(pid, fd, start); err != nil || !ws.Signaled() || ws.Signal() != unix.SIGTERM {
		t.Errorf("it ended by %v, %v", ws, err)
	}
	if _, _, err := ProcStat(-1); !os.IsNotExist(err) {
		t.Errorf("no process: %v", err)
	}
}
