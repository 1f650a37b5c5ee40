package sys

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNotExited is returned by ExitInfo for a process that runs, or that has
// ended and was not yet reaped by its parent.
var ErrNotExited = errors.New("process has no exit status yet")

const (
	pidfdGetInfo  = 0xc040ff0b
	pidfdInfoExit = 1 << 3
)

// pidfdInfo is struct pidfd_info in its first published size.
type pidfdInfo struct {
	Mask     uint64
	CgroupID uint64
	PID      uint32
	TGID     uint32
	PPID     uint32
	IDs      [8]uint32 // real, effective, saved and file system user and group
	ExitCode int32
}

// OpenPidfd returns a pidfd, close-on-exec, for a process. The caller closes it.
func OpenPidfd(pid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("pidfd_open %d: %w", pid, err)
	}
	return fd, nil
}

// PidfdPID returns the process that a pidfd stands for, as this process' own
// PID namespace numbers it. It fails with ESRCH once that has been reaped.
func PidfdPID(pidfd int) (int, error) {
	path := "/proc/self/fdinfo/" + strconv.Itoa(pidfd)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("pidfd %d: %w", pidfd, err)
	}
	for line := range strings.Lines(string(b)) {
		v, ok := strings.CutPrefix(line, "Pid:")
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(v))
		if err != nil {
			return 0, fmt.Errorf("pidfd %d: %s: Pid: %w", pidfd, path, err)
		}
		if pid <= 0 { // -1: reaped, 0: of a PID namespace that we cannot see
			return 0, fmt.Errorf("pidfd %d: %w", pidfd, unix.ESRCH)
		}
		return pid, nil
	}
	return 0, fmt.Errorf("descriptor %d is no pidfd: %w", pidfd, unix.EBADF)
}

// PidfdGetfd duplicates descriptor target of the process that pidfd stands for.
// The copy is close-on-exec.
func PidfdGetfd(pidfd, target int) (int, error) {
	fd, err := unix.PidfdGetfd(pidfd, target, 0)
	if err != nil {
		return -1, fmt.Errorf("pidfd_getfd %d: %w", target, err)
	}
	return fd, nil
}

// PidfdSignal sends a signal; signal 0 only checks that the process has not
// been reaped, and ESRCH says that it has.
func PidfdSignal(pidfd int, sig unix.Signal) error {
	if err := unix.PidfdSendSignal(pidfd, sig, nil, 0); err != nil {
		return fmt.Errorf("pidfd_send_signal %d: %w", int(sig), err)
	}
	return nil
}

// PidfdExited says, without waiting, whether the process has ended.
func PidfdExited(pidfd int) (bool, error) {
	return pollPidfd([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
}

// PidfdOver says, without waiting, whether a process runs its program no more: it
// has ended, or is on its way to its end and has given its memory up already, as a
// large process has for some time before PidfdExited says so.
func PidfdOver(pid, pidfd int) (bool, error) {
	// proc_pid_cmdline(5): it is read from the process's memory, and empty
	// without.
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	// Asked last: if it has not ended, pid was its number just now.
	exited, err2 := PidfdExited(pidfd)
	if err2 != nil || exited {
		return exited, err2
	}
	return err == nil && len(line) == 0, err
}

// WaitPidfd returns nil as soon as the process has ended, whether or not it is
// a child, and does not reap it. Unlike wait4 and os.Process.Wait it is not
// woken by the stops of a process that this program traces.
func WaitPidfd(ctx context.Context, pidfd int) error {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		// The counter of a fresh eventfd cannot overflow by one.
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-woken
		}
		unix.Close(wake)
	}()
	fds := []unix.PollFd{
		{Fd: int32(pidfd), Events: unix.POLLIN},
		{Fd: int32(wake), Events: unix.POLLIN},
	}
	exited, err := pollPidfd(fds, -1)
	if err != nil || exited {
		return err
	}
	return ctx.Err()
}

// pollPidfd polls and says whether the first descriptor, a pidfd, is ready.
func pollPidfd(fds []unix.PollFd, timeout int) (bool, error) {
	for {
		_, err := unix.Poll(fds, timeout)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return false, fmt.Errorf("poll pidfd: %w", err)
		case fds[0].Revents&unix.POLLNVAL != 0:
			return false, fmt.Errorf("poll pidfd: %w", unix.EBADF)
		}
		return fds[0].Revents&(unix.POLLIN|unix.POLLHUP) != 0, nil
	}
}

// ExitInfo returns how a process ended that somebody else has reaped. It needs
// Linux 6.15 and a pidfd from before the end; on an older kernel the error
// matches errors.ErrUnsupported, and before the end ErrNotExited.
func ExitInfo(pidfd int) (unix.WaitStatus, error) {
	info := pidfdInfo{Mask: pidfdInfoExit}
	err := ioctl(pidfd, pidfdGetInfo, unsafe.Pointer(&info))
	switch {
	case err == nil && info.Mask&pidfdInfoExit != 0:
		return unix.WaitStatus(info.ExitCode), nil
	case err == nil:
		return 0, ErrNotExited
	case err == unix.ENOTTY, err == unix.EINVAL:
		return 0, fmt.Errorf("PIDFD_GET_INFO: %w", errors.ErrUnsupported)
	case err == unix.ESRCH || err == unix.EREMOTE:
		// Linux 6.13 and 6.14 have the call, but keep nothing of the dead.
		return 0, fmt.Errorf("PIDFD_GET_INFO: %w (%w)", errors.ErrUnsupported, err)
	}
	return 0, fmt.Errorf("PIDFD_GET_INFO: %w", err)
}
