package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/pki"
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
	Name       string            `yaml:"name"`
	Listen     string            `yaml:"listen"`
	Socket     string            `yaml:"socket"`
	StateDir   string            `yaml:"state_dir"`
	RunDir     string            `yaml:"run_dir"`
	MemoryDir  string            `yaml:"memory_dir"`
	TLS        agentTLS          `yaml:"tls"`
	Peers      map[string]string `yaml:"peers"`
	Hypervisor Hypervisor        `yaml:"hypervisor,omitempty"`
	Libvirt    *agentLibvirt     `yaml:"libvirt,omitempty"`
	Log        agentLog          `yaml:"log"`
}

type agentLibvirt struct {
	URI string `yaml:"uri"`
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
	if l.Hypervisor() == Libvirt {
		c.Hypervisor, c.Libvirt = Libvirt, &agentLibvirt{URI: LibvirtURI}
		// As the host sees them: shorter, and open to a QEMU that is not root.
		c.RunDir, c.Socket = "/run/lmctl", "/run/lmctl/agent.sock"
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

// StartAgent starts a host's agent and waits until it answers.
func (l *Lab) StartAgent(ctx context.Context, host string) error {
	return l.StartDaemon(ctx, host, Agent)
}

// SignalAgent sends a signal to a host's agent. With wait it returns when the
// agent has ended. Guests of the host are not concerned.
func (l *Lab) SignalAgent(ctx context.Context, host string, sig unix.Signal, wait bool) error {
	return l.SignalDaemon(ctx, host, Agent, sig, wait)
}

// KillAgent ends a host's agent as a crash would.
func (l *Lab) KillAgent(ctx context.Context, host string) error {
	return l.KillDaemon(ctx, host, Agent)
}

// StopAgent asks a host's agent to end, and waits until it has.
func (l *Lab) StopAgent(ctx context.Context, host string) error {
	return l.SignalAgent(ctx, host, unix.SIGTERM, true)
}

// AgentRuns says whether a host's agent runs.
func (l *Lab) AgentRuns(host string) (bool, error) { return l.DaemonRuns(host, Agent) }

// agentCommand is how a host's agent is started.
func (l *Lab) agentCommand(host string) *exec.Cmd {
	cmd := exec.Command(l.state.Binary, "agent", "--config", l.AgentConfig(host))
	cmd.Env = l.environment(host)
	for _, e := range l.state.AgentEnv {
		cmd.Env = append(cmd.Env, strings.ReplaceAll(e, "{host}", host))
	}
	return cmd
}

// agentAnswers tries whether an agent accepts connections on its socket.
func (l *Lab) agentAnswers(ctx context.Context, host string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", l.AgentSocket(host))
	if err != nil {
		return err
	}
	return c.Close()
}

func (l *Lab) isHost(host string) error {
	if i := hostNumber(host); i < 1 || i > l.state.Hosts {
		return fmt.Errorf("lab: no such host: %q: there are %s", host, strings.Join(l.Hosts(), ", "))
	}
	return nil
}
