package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/sys"
)

// Daemon is a program that runs on a host as long as the lab is up.
type Daemon string

// The daemons. libvirt's are on the hosts of a lab with libvirt.
const (
	Agent    Daemon = "agent"
	Libvirtd Daemon = "libvirtd"
	Virtlogd Daemon = "virtlogd" // only if the lab was made with it
)

// Daemons are what is to run on each host, in the order in which it is started.
// An agent is among them also in a lab that was made without agents.
func (l *Lab) Daemons() []Daemon {
	switch {
	case l.Hypervisor() != Libvirt:
		return []Daemon{Agent}
	case l.state.Libvirt.Virtlogd:
		return []Daemon{Virtlogd, Libvirtd, Agent}
	}
	return []Daemon{Libvirtd, Agent}
}

// command is how a daemon is started, and answers tries whether it is at work.
func (l *Lab) command(host string, d Daemon) (cmd *exec.Cmd, answers func(context.Context, string) error, err error) {
	switch d {
	case Agent:
		return l.agentCommand(host), l.agentAnswers, nil
	case Libvirtd:
		cmd, err = l.libvirtdCommand(host)
		return cmd, l.libvirtdAnswers, err
	case Virtlogd:
		cmd, err = l.virtlogdCommand(host)
		return cmd, l.virtlogdAnswers, err
	}
	return nil, nil, fmt.Errorf("lab: no such daemon: %q", d)
}

// hasDaemon is about a daemon that this lab does not have.
func (l *Lab) hasDaemon(host string, d Daemon) error {
	if err := l.isHost(host); err != nil {
		return err
	}
	for _, has := range l.Daemons() {
		if has == d {
			return nil
		}
	}
	return fmt.Errorf("lab: %s has no %s", host, d)
}

// StartDaemon starts a daemon of a host and waits until it answers.
func (l *Lab) StartDaemon(ctx context.Context, host string, d Daemon) error {
	pidfd, err := l.openDaemon(host, d)
	if err == nil {
		_ = unix.Close(pidfd)
		return fmt.Errorf("lab: the %s of %s runs already", d, host)
	}
	if !errors.Is(err, errNotRunning) {
		return err
	}
	p, err := l.launch(host, d)
	if err != nil {
		return err
	}
	return l.await(ctx, p)
}

// startAll starts a daemon on all hosts at once.
func (l *Lab) startAll(ctx context.Context, d Daemon) error {
	var procs []*running
	for _, host := range l.Hosts() {
		p, err := l.launch(host, d)
		if err != nil {
			return err
		}
		procs = append(procs, p)
	}
	for _, p := range procs {
		if err := l.await(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// StartDead starts the daemons that do not run and returns what it has started,
// in words.
func (l *Lab) StartDead(ctx context.Context) ([]string, error) {
	unlock, err := lock(l.dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var started []string
	for _, host := range l.Hosts() {
		for _, d := range l.Daemons() {
			runs, err := l.DaemonRuns(host, d)
			if err != nil {
				return started, err
			}
			if runs {
				continue
			}
			if err := l.StartDaemon(ctx, host, d); err != nil {
				return started, err
			}
			started = append(started, fmt.Sprintf("the %s of %s", d, host))
		}
	}
	return started, nil
}

// SignalDaemon sends a signal to a daemon of a host. With wait it returns when
// the daemon has ended. Guests of the host are not concerned.
func (l *Lab) SignalDaemon(ctx context.Context, host string, d Daemon, sig unix.Signal, wait bool) error {
	pidfd, err := l.openDaemon(host, d)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	if err := sys.PidfdSignal(pidfd, sig); err != nil {
		return fmt.Errorf("lab: signal the %s of %s: %w", d, host, err)
	}
	if !wait {
		return nil
	}
	if err := sys.WaitPidfd(ctx, pidfd); err != nil {
		return fmt.Errorf("lab: wait for the %s of %s to end: %w", d, host, err)
	}
	return nil
}

// KillDaemon ends a daemon of a host as a crash would.
func (l *Lab) KillDaemon(ctx context.Context, host string, d Daemon) error {
	return l.SignalDaemon(ctx, host, d, unix.SIGKILL, true)
}

// errNotRunning says that a daemon does not run.
var errNotRunning = errors.New("it does not run")

// DaemonRuns says whether a daemon of a host runs.
func (l *Lab) DaemonRuns(host string, d Daemon) (bool, error) {
	pidfd, err := l.openDaemon(host, d)
	if errors.Is(err, errNotRunning) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, unix.Close(pidfd)
}

// running is a daemon that this process has started.
type running struct {
	host  string
	d     Daemon
	ready func(context.Context, string) error
	ended chan struct{} // closed when it has ended
	err   error         // how; only to be read then
}

// daemonPID is what a file like agent.pid says, enough to know the process
// again.
type daemonPID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start_time"` // sys.StartTime
}

func (l *Lab) pidFile(host string, d Daemon) string {
	return filepath.Join(l.HostDir(host), string(d)+".pid")
}

// DaemonLog is the file with what a daemon of a host has said.
func (l *Lab) DaemonLog(host string, d Daemon) string {
	return filepath.Join(l.HostDir(host), string(d)+".log")
}

// launch starts a daemon in its host's namespaces and a session of its own, so
// that it outlives this process.
func (l *Lab) launch(host string, d Daemon) (*running, error) {
	cmd, ready, err := l.command(host, d)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(l.DaemonLog(host, d), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	defer log.Close()
	cmd.Dir = l.HostDir(host)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := l.onNode(host, cmd.Start); err != nil {
		return nil, fmt.Errorf("lab: start the %s of %s: %w", d, host, err)
	}
	p := &running{host: host, d: d, ready: ready, ended: make(chan struct{})}
	go func() { // ends with the daemon, at Down at the latest
		p.err = cmd.Wait()
		close(p.ended)
	}()
	start, err := sys.StartTime(cmd.Process.Pid)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lab: %s of %s: %w", d, host, err), cmd.Process.Kill())
	}
	b, err := json.Marshal(daemonPID{PID: cmd.Process.Pid, Start: start})
	if err == nil {
		err = writeWhole(l.pidFile(host, d), b)
	}
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill())
	}
	return p, nil
}

// daemonPatience is how long a daemon may take until it answers. libvirtd tries
// out every QEMU before it does.
const daemonPatience = time.Minute

// await waits until a daemon answers.
func (l *Lab) await(ctx context.Context, p *running) error {
	ctx, cancel := context.WithTimeout(ctx, daemonPatience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := p.ready(ctx, p.host)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-p.ended:
			return fmt.Errorf("lab: the %s of %s has ended: %w: %s", p.d, p.host, p.err, l.lastWords(p.host, p.d))
		case <-ctx.Done():
			return fmt.Errorf("lab: the %s of %s does not answer: %w: %w: %s", p.d, p.host, ctx.Err(), err, l.lastWords(p.host, p.d))
		}
	}
}

// lastWords is the end of a daemon's log.
func (l *Lab) lastWords(host string, d Daemon) string {
	f, err := os.Open(l.DaemonLog(host, d))
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const enough = 2000
	if end, err := f.Seek(0, io.SeekEnd); err == nil {
		_, err = f.Seek(max(0, end-enough), io.SeekStart)
		if err != nil {
			return err.Error()
		}
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// openDaemon returns a pidfd of a daemon of a host, or errNotRunning.
func (l *Lab) openDaemon(host string, d Daemon) (int, error) {
	if err := l.hasDaemon(host, d); err != nil {
		return -1, err
	}
	none := fmt.Errorf("lab: the %s of %s: %w", d, host, errNotRunning)
	b, err := os.ReadFile(l.pidFile(host, d))
	if errors.Is(err, os.ErrNotExist) {
		return -1, none
	}
	if err != nil {
		return -1, fmt.Errorf("lab: %w", err)
	}
	var p daemonPID
	if err := json.Unmarshal(b, &p); err != nil || p.PID <= 1 {
		return -1, fmt.Errorf("lab: %s: not a process: %q", l.pidFile(host, d), b)
	}
	pidfd, err := sys.OpenPidfd(p.PID)
	if errors.Is(err, unix.ESRCH) {
		return -1, none
	}
	if err != nil {
		return -1, fmt.Errorf("lab: %s of %s: %w", d, host, err)
	}
	// The number may have been given to somebody else since, and a zombie is
	// no daemon.
	start, err := sys.StartTime(p.PID)
	exited, err2 := sys.PidfdExited(pidfd)
	if err != nil || err2 != nil || start != p.Start || exited {
		_ = unix.Close(pidfd)
		return -1, none
	}
	return pidfd, nil
}
