//go:build amd64

package dirtymap

import (
	"errors"
	"fmt"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func init() { roles["filtered"] = filteredMain }

// filteredMain is a victim whose main thread may not call userfaultfd; args[0] is
// what the filter does then.
func filteredMain(args []string) error {
	var action uint32
	if _, err := fmt.Sscan(args[0], &action); err != nil {
		return err
	}
	const nrOffset = 0 // struct seccomp_data: nr
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nrOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_USERFAULTFD, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: action},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return errno
	}
	return victimMain(nil)
}

// TestSeccomp: a filter that forbids the call makes Attach fail, and harms nobody.
func TestSeccomp(t *testing.T) {
	requireTracking(t)
	for _, c := range []struct {
		name   string
		action int
		want   error
	}{
		{"error", unix.SECCOMP_RET_ERRNO | int(unix.EPERM), ErrPermission},
		{"no such call", unix.SECCOMP_RET_ERRNO | int(unix.ENOSYS), ErrUnsupported},
		{"signal", unix.SECCOMP_RET_TRAP, ErrPermission},
		{"end of the process", unix.SECCOMP_RET_KILL_PROCESS, ErrExited},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := startRole(t, "filtered", fmt.Sprint(c.action))
			if s := v.line(t); s != "ready true" {
				t.Fatalf("victim: %q", s)
			}
			if c.want != ErrExited {
				v.healthy(t)
			}
			for range 5 {
				if _, err := Attach(v.Process, nil); !errors.Is(err, c.want) {
					t.Fatalf("attach: %v", err)
				}
			}
			if c.want != ErrExited {
				v.healthy(t)
				v.noUserfaultfd(t)
			}
		})
	}
}
