package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/goccy/go-yaml"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/internal/sys"
)

// Operator is the name on the certificate of whoever uses the lab.
const Operator = "operator"

// makeCertificates makes an authority for the lab, a certificate for each host
// and one for its operator.
func (l *Lab) makeCertificates() error {
	ca := l.CertDir("ca")
	if err := os.MkdirAll(filepath.Dir(ca), 0o700); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := pki.Init(ca); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	for _, host := range l.Hosts() {
		req := pki.Request{Role: pki.Host, Name: host}
		for _, a := range addresses(hostNumber(host)) {
			req.SANs = append(req.SANs, a.Addr().String())
		}
		if err := pki.Issue(ca, req, l.CertDir(host)); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	if err := pki.Issue(ca, pki.Request{Role: pki.Operator, Name: Operator}, l.CertDir(Operator)); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// agentConfig is what a lab's agent is told; all else keeps its default.
type agentConfig struct {
	Name      string            `yaml:"name"`
	Listen    string            `yaml:"listen"`
	Socket    string            `yaml:"socket"`
	StateDir  string            `yaml:"state_dir"`
	RunDir    string            `yaml:"run_dir"`
	MemoryDir string            `yaml:"memory_dir"`
	TLS       agentTLS          `yaml:"tls"`
	Peers     map[string]string `yaml:"peers"`
	Log       agentLog          `yaml:"log"`
}

type agentTLS struct {
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

type agentLog struct {
	Level string `yaml:"level"`
}

func (l *Lab) writeAgentConfig(host string) error {
	files := pki.FilesIn(l.CertDir(host))
	c := agentConfig{
		Name: host, Listen: l.agentAddress(host), Socket: l.AgentSocket(host),
		StateDir: l.StateDir(host), RunDir: l.RunDir(host), MemoryDir: l.MemoryDir(host),
		TLS:   agentTLS{CA: files.CA, Cert: files.Cert, Key: files.Key},
		Peers: make(map[string]string),
		Log:   agentLog{Level: "debug"},
	}
	for _, peer := range l.Hosts() {
		if peer != host {
			c.Peers[peer] = l.agentAddress(peer)
		}
	}
	b, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("lab: configuration of %s's agent: %w", host, err)
	}
	return writeWhole(l.AgentConfig(host), b)
}

// agentAddress is where the agent of a host of this lab listens.
func (l *Lab) agentAddress(host string) string {
	return net.JoinHostPort(addresses(hostNumber(host))[0].Addr().String(), strconv.Itoa(AgentPort))
}

func (l *Lab) startAgents(ctx context.Context) error {
	// All at once: each takes its time to begin.
	procs := make(map[string]*agentProcess)
	for _, host := range l.Hosts() {
		p, err := l.launchAgent(host)
		if err != nil {
			return err
		}
		procs[host] = p
	}
	for _, host := range l.Hosts() {
		if err := l.awaitAgent(ctx, host, procs[host]); err != nil {
			return err
		}
	}
	return nil
}

// StartAgent starts a host's agent and waits until it answers.
func (l *Lab) StartAgent(ctx context.Context, host string) error {
	if err := l.isHost(host); err != nil {
		return err
	}
	if pidfd, err := l.openAgent(host); err == nil {
		_ = unix.Close(pidfd)
		return fmt.Errorf("lab: the agent of %s runs already", host)
	}
	p, err := l.launchAgent(host)
	if err != nil {
		return err
	}
	return l.awaitAgent(ctx, host, p)
}

// StartDeadAgents starts the agents that do not run and returns their hosts.
func (l *Lab) StartDeadAgents(ctx context.Context) ([]string, error) {
	unlock, err := lock(l.dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var started []string
	for _, host := range l.Hosts() {
		runs, err := l.AgentRuns(host)
		if err != nil {
			return started, err
		}
		if runs {
			continue
		}
		if err := l.StartAgent(ctx, host); err != nil {
			return started, err
		}
		started = append(started, host)
	}
	return started, nil
}

// agentProcess is an agent that this process has started.
type agentProcess struct {
	ended chan struct{} // closed when it has ended
	err   error         // how; only to be read then
}

// agentPID is what the file agent.pid says, enough to know the process again.
type agentPID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start_time"` // sys.StartTime
}

func (l *Lab) pidFile(host string) string { return filepath.Join(l.HostDir(host), "agent.pid") }

// launchAgent starts an agent in its host's namespace and a session of its own,
// so that it outlives this process.
func (l *Lab) launchAgent(host string) (*agentProcess, error) {
	log, err := os.OpenFile(l.AgentLog(host), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(l.state.Binary, "agent", "--config", l.AgentConfig(host))
	cmd.Env = l.environment(host)
	for _, e := range l.state.AgentEnv {
		cmd.Env = append(cmd.Env, strings.ReplaceAll(e, "{host}", host))
	}
	cmd.Dir = l.HostDir(host)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := inNamespace(l.namespace(host), cmd.Start); err != nil {
		return nil, fmt.Errorf("lab: start the agent of %s: %w", host, err)
	}
	p := &agentProcess{ended: make(chan struct{})}
	go func() { // ends with the agent, at Down at the latest
		p.err = cmd.Wait()
		close(p.ended)
	}()
	start, err := sys.StartTime(cmd.Process.Pid)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lab: agent of %s: %w", host, err), cmd.Process.Kill())
	}
	b, err := json.Marshal(agentPID{PID: cmd.Process.Pid, Start: start})
	if err == nil {
		err = writeWhole(l.pidFile(host), b)
	}
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill())
	}
	return p, nil
}

// agentPatience is how long an agent may take until it answers.
const agentPatience = 30 * time.Second

// awaitAgent waits until an agent accepts connections on its socket.
func (l *Lab) awaitAgent(ctx context.Context, host string, p *agentProcess) error {
	ctx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var d net.Dialer
	for {
		c, err := d.DialContext(ctx, "unix", l.AgentSocket(host))
		if err == nil {
			return c.Close()
		}
		select {
		case <-tick.C:
		case <-p.ended:
			return fmt.Errorf("lab: the agent of %s has ended: %w: %s", host, p.err, l.lastWords(host))
		case <-ctx.Done():
			return fmt.Errorf("lab: the agent of %s does not answer: %w: %s", host, ctx.Err(), l.lastWords(host))
		}
	}
}

// lastWords is the end of an agent's log.
func (l *Lab) lastWords(host string) string {
	f, err := os.Open(l.AgentLog(host))
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

// SignalAgent sends a signal to a host's agent. With wait it returns when the
// agent has ended. Guests of the host are not concerned.
func (l *Lab) SignalAgent(ctx context.Context, host string, sig unix.Signal, wait bool) error {
	pidfd, err := l.openAgent(host)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	if err := sys.PidfdSignal(pidfd, sig); err != nil {
		return fmt.Errorf("lab: signal the agent of %s: %w", host, err)
	}
	if !wait {
		return nil
	}
	if err := sys.WaitPidfd(ctx, pidfd); err != nil {
		return fmt.Errorf("lab: wait for the agent of %s to end: %w", host, err)
	}
	return nil
}

// KillAgent ends a host's agent as a crash would.
func (l *Lab) KillAgent(ctx context.Context, host string) error {
	return l.SignalAgent(ctx, host, unix.SIGKILL, true)
}

// StopAgent asks a host's agent to end, and waits until it has.
func (l *Lab) StopAgent(ctx context.Context, host string) error {
	return l.SignalAgent(ctx, host, unix.SIGTERM, true)
}

// errNoAgent says that a host's agent does not run.
var errNoAgent = errors.New("its agent does not run")

// AgentRuns says whether a host's agent runs.
func (l *Lab) AgentRuns(host string) (bool, error) {
	pidfd, err := l.openAgent(host)
	if errors.Is(err, errNoAgent) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, unix.Close(pidfd)
}

// openAgent returns a pidfd of a host's agent.
func (l *Lab) openAgent(host string) (int, error) {
	if err := l.isHost(host); err != nil {
		return -1, err
	}
	none := fmt.Errorf("lab: %s: %w", host, errNoAgent)
	b, err := os.ReadFile(l.pidFile(host))
	if errors.Is(err, os.ErrNotExist) {
		return -1, none
	}
	if err != nil {
		return -1, fmt.Errorf("lab: %w", err)
	}
	var p agentPID
	if err := json.Unmarshal(b, &p); err != nil || p.PID <= 1 {
		return -1, fmt.Errorf("lab: %s: not a process: %q", l.pidFile(host), b)
	}
	pidfd, err := sys.OpenPidfd(p.PID)
	if errors.Is(err, unix.ESRCH) {
		return -1, none
	}
	if err != nil {
		return -1, fmt.Errorf("lab: agent of %s: %w", host, err)
	}
	// The number may have been given to somebody else since, and a zombie is
	// no agent.
	start, err := sys.StartTime(p.PID)
	exited, err2 := sys.PidfdExited(pidfd)
	if err != nil || err2 != nil || start != p.Start || exited {
		_ = unix.Close(pidfd)
		return -1, none
	}
	return pidfd, nil
}

func (l *Lab) isHost(host string) error {
	if i := hostNumber(host); i < 1 || i > l.state.Hosts {
		return fmt.Errorf("lab: no such host: %q: there are %s", host, strings.Join(l.Hosts(), ", "))
	}
	return nil
}
