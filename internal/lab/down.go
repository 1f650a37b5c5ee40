package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// Down ends the lab in a state folder (DefaultDir if empty) and removes all of
// it: processes, mounts, namespaces, folder. What is not there is not missed, so
// it also cleans up after a crash, and where no lab is it does nothing.
func Down(ctx context.Context, dir string) error {
	if dir == "" {
		dir = DefaultDir
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	unlock, err := lock(dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := refuseForeign(dir); err != nil {
		return err
	}
	return remove(ctx, dir)
}

// refuseForeign is about a folder that no lab has made.
func refuseForeign(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	ours := slices.Contains(names, filepath.Base(stateFile(dir))) || len(names) == 0 ||
		len(names) == 1 && names[0] == filepath.Base(stateFile(dir))+".new"
	if !ours {
		return fmt.Errorf("lab: %s holds something else than a lab: it is left alone", dir)
	}
	return nil
}

// clear makes dir ready for a new lab: what a crash has left there goes, a lab
// that is up stays.
func clear(ctx context.Context, dir string) error {
	if err := refuseForeign(dir); err != nil {
		return err
	}
	s, err := load(dir)
	if err == nil && s.Ready {
		inodes, err := namespaceInodes(s.ID)
		if err != nil {
			return err
		}
		if len(inodes) > 0 {
			return fmt.Errorf("%w in %s: `lmctl lab down` removes it", ErrUp, dir)
		}
	}
	if err := remove(ctx, dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// remove removes a lab and its folder, going as far as it can.
func remove(ctx context.Context, dir string) error {
	var kept error // whether what is of use to the next lab could be kept
	s, err := load(dir)
	switch {
	case errors.Is(err, ErrNone):
		// Nothing was made yet.
	case err != nil:
		return err
	default:
		if err := endProcesses(ctx, s.ID); err != nil {
			return err
		}
		if err := removeNamespaces(s.ID); err != nil {
			return err
		}
		l := &Lab{dir: dir, state: s}
		kept = l.keepCapabilities()
	}
	if err := unmountBelow(dir); err != nil {
		return err
	}
	// The state file goes last: as long as it is there, Down knows what is its
	// own.
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	for _, e := range entries {
		if path := filepath.Join(dir, e.Name()); path != stateFile(dir) {
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("lab: %w", err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return kept
}

// grace is how long agents may take to end when they are asked to.
const grace = 5 * time.Second

// endProcesses ends every process in the namespaces of a lab: its agents first,
// and when they have ended, guests and whatever else runs there.
func endProcesses(ctx context.Context, id string) error {
	procs, err := processesOf(id)
	if err != nil {
		return err
	}
	defer func() { closeAll(procs) }()
	asked, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	for _, p := range procs {
		if p.agent {
			if err := p.end(asked, unix.SIGTERM); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return err
			}
		}
	}
	// Whoever was started meanwhile is found by looking until there is nobody.
	for len(procs) > 0 {
		for _, p := range procs {
			if err := p.end(ctx, unix.SIGKILL); err != nil {
				return err
			}
		}
		closeAll(procs)
		if procs, err = processesOf(id); err != nil {
			return err
		}
	}
	return nil
}

// process is one that runs in a namespace of the lab, named for good.
type process struct {
	pid, pidfd int
	agent      bool
}

func (p process) end(ctx context.Context, sig unix.Signal) error {
	if err := sys.PidfdSignal(p.pidfd, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("lab: end process %d: %w", p.pid, err)
	}
	if err := sys.WaitPidfd(ctx, p.pidfd); err != nil {
		return fmt.Errorf("lab: wait for the end of process %d: %w", p.pid, err)
	}
	return nil
}

func closeAll(procs []process) {
	for _, p := range procs {
		_ = unix.Close(p.pidfd) // a pidfd has nothing to lose
	}
}

// processesOf finds the processes in a lab's namespaces, but for this one.
// Nothing else tells them: not their names, and not a number that was written
// down and may be somebody else's by now.
func processesOf(id string) ([]process, error) {
	inodes, err := namespaceInodes(id)
	if err != nil || len(inodes) == 0 {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	var procs []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !inLab(pid, inodes) {
			continue
		}
		pidfd, err := sys.OpenPidfd(pid)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			closeAll(procs)
			return nil, fmt.Errorf("lab: process %d: %w", pid, err)
		}
		// Only now is it certain that the number is still the same process's.
		if !inLab(pid, inodes) {
			_ = unix.Close(pidfd)
			continue
		}
		procs = append(procs, process{pid: pid, pidfd: pidfd, agent: isAgent(pid)})
	}
	return procs, nil
}

// inLab says whether a process that has not ended is in one of the namespaces.
func inLab(pid int, inodes map[uint64]bool) bool {
	ino, err := inode(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && inodes[ino] // one that has ended has no namespace
}

// isAgent tells who is to be asked before being ended. A wrong answer costs
// time, no more.
func isAgent(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	argv := strings.Split(string(b), "\x00")
	return len(argv) > 1 && argv[1] == "agent"
}

// unmountBelow unmounts all that is mounted under dir.
func unmountBelow(dir string) error {
	points, err := mountPoints(dir)
	if err != nil {
		return err
	}
	for _, point := range slices.Backward(points) {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("lab: unmount %s: %w", point, err)
		}
	}
	return nil
}

// mountPoints are those under dir, in the order in which they were mounted.
func mountPoints(dir string) ([]string, error) {
	// The kernel says where things are mounted with links resolved.
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	defer f.Close()
	var points []string
	for in := bufio.NewScanner(f); in.Scan(); {
		// proc_pid_mountinfo(5): the fifth field, with odd characters escaped.
		fields := strings.Fields(in.Text())
		if len(fields) < 5 {
			continue
		}
		point := unescape(fields[4])
		if strings.HasPrefix(point, dir+"/") {
			points = append(points, point)
		}
	}
	return points, nil
}

// unescape undoes mountinfo's \040 and the like.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
