package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// process is a domain's QEMU.
type process struct {
	pid   int
	pidfd int
	uid   int // the user that QEMU runs as
	gid   int
	start uint64        // when it began, by sys.ProcStat
	ended chan struct{} // closed when it has ended
	stop  context.CancelFunc
	over  chan struct{} // closed when nobody watches any more
	exit  *unix.WaitStatus
	// endedAt is when that was noticed, once ended is closed.
	endedAt time.Time
}

// errNoProcess says that a domain has no process.
var errNoProcess = errors.New("the domain has no process")

// findProcess opens the QEMU of a domain, which libvirtd's PID file names. The
// process itself says that it is this domain's.
func (d *Driver) findProcess(name, uuid string) (*process, error) {
	path := filepath.Join(d.cfg.PIDDir, name+".pid")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoProcess
	}
	if err != nil {
		return nil, fmt.Errorf("libvirt: PID of domain %s: %w", name, err)
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(text)))
	if err != nil {
		return nil, fmt.Errorf("libvirt: PID of domain %s: %s: %w", name, path, err)
	}
	pidfd, err := sys.OpenPidfd(pid)
	if err != nil {
		return nil, errors.Join(errNoProcess, err)
	}
	// The descriptor is open first: what /proc says now is true of its process.
	p, err := identify(pid, pidfd, uuid)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("libvirt: process %d of domain %s: %w", pid, name, err), unix.Close(pidfd))
	}
	return p, nil
}

// identify checks by its command line that a process is the QEMU of a domain.
func identify(pid, pidfd int, uuid string) (*process, error) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	at := slices.Index(args, "-uuid")
	if at < 0 || at+1 >= len(args) || args[at+1] != uuid {
		return nil, errNoProcess
	}
	start, _, err := sys.ProcStat(pid)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil {
		return nil, err
	}
	if ended, err := sys.PidfdExited(pidfd); ended || err != nil {
		return nil, errors.Join(errNoProcess, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	p := &process{pid: pid, pidfd: pidfd, uid: int(st.Uid), gid: int(st.Gid), start: start, ended: make(chan struct{}), stop: stop, over: make(chan struct{})}
	go p.watch(ctx)
	return p, nil
}

// watch closes ended when the process has ended.
func (p *process) watch(ctx context.Context) {
	defer close(p.over)
	if err := sys.WaitPidfd(ctx, p.pidfd); err != nil {
		return // close was called
	}
	if ws, err := sys.EndOf(p.pid, p.pidfd, p.start); err == nil {
		p.exit = &ws
	}
	p.endedAt = time.Now()
	close(p.ended)
}

// dead says whether the process runs no more: it has ended, or is about to. One of
// which that cannot be told may run.
func (p *process) dead() bool {
	select {
	case <-p.ended: // and closed, perhaps
		return true
	default:
	}
	over, err := sys.PidfdOver(p.pid, p.pidfd)
	return err == nil && over
}

// duplicate is a pidfd of the caller's own.
func (p *process) duplicate() (int, error) {
	fd, err := unix.FcntlInt(uintptr(p.pidfd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("libvirt: duplicate the pidfd of %d: %w", p.pid, err)
	}
	return fd, nil
}

// close stops watching; the process goes on.
func (p *process) close() error {
	if p == nil {
		return nil
	}
	p.stop()
	<-p.over
	return unix.Close(p.pidfd)
}
