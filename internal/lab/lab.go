package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Errors that a caller may want to tell apart.
var (
	ErrUp   = errors.New("a lab is up already")
	ErrNone = errors.New("no lab is up")

	errNotRoot = errors.New("lab: it needs root, for namespaces and mounts")
)

// Options say what lab to make.
type Options struct {
	Dir    string // state folder; DefaultDir if empty
	Hosts  int    // how many; 2 if 0
	Binary string // the lmctl that agents are run from; this program if empty
	// MemoryLimit is the size of each host's tmpfs for guest memory, in bytes;
	// half of the machine's memory if 0.
	MemoryLimit int64
	// DiskLimit is the size of a file system that holds each host's DiskDir, in
	// bytes; the folder is on the machine's if 0.
	DiskLimit int64
	// NoAgents leaves the hosts without agents, for those who start their own.
	NoAgents bool
	// AgentEnv is added to the environment of agents.
	AgentEnv []string
	// Hypervisor is what runs the guests; QEMU if empty. Libvirt says how, if
	// it is libvirt.
	Hypervisor Hypervisor
	Libvirt    LibvirtOptions
}

// state is what a lab knows of itself, in the file lab.json of its folder. It is
// written before anything else is made, so that what a crash leaves is found.
type state struct {
	ID          string          `json:"id"` // unique among the labs of this machine
	Hosts       int             `json:"hosts"`
	Binary      string          `json:"binary"`
	MemoryLimit int64           `json:"memory_limit"`
	DiskLimit   int64           `json:"disk_limit,omitempty"`
	AgentEnv    []string        `json:"agent_env,omitempty"`
	Hypervisor  Hypervisor      `json:"hypervisor,omitempty"`
	Libvirt     *LibvirtOptions `json:"libvirt,omitempty"` // with Hypervisor Libvirt
	Ready       bool            `json:"ready"`             // Up came to its end
}

// Lab is a lab that is up.
type Lab struct {
	dir   string
	state state
}

// Dir is the lab's state folder.
func (l *Lab) Dir() string { return l.dir }

// ID is what the names of the lab's namespaces have in common.
func (l *Lab) ID() string { return l.state.ID }

// Up makes a lab. What is left of one that has crashed is removed first; one
// that is up is ErrUp. When Up fails or ctx ends, nothing is left.
func Up(ctx context.Context, o Options) (*Lab, error) {
	l, err := newLab(o)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	unlock, err := lock(l.dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := clear(ctx, l.dir); err != nil {
		return nil, err
	}
	if err := l.build(ctx, o.NoAgents); err != nil {
		// The caller may have given up: cleaning goes on regardless.
		return nil, errors.Join(err, remove(context.WithoutCancel(ctx), l.dir))
	}
	return l, nil
}

func newLab(o Options) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errNotRoot
	}
	l := &Lab{dir: o.Dir, state: state{
		Hosts: o.Hosts, Binary: o.Binary, MemoryLimit: o.MemoryLimit, DiskLimit: o.DiskLimit,
		AgentEnv: o.AgentEnv, Hypervisor: o.Hypervisor, Libvirt: &o.Libvirt,
	}}
	if l.dir == "" {
		l.dir = DefaultDir
	}
	var err error
	if l.dir, err = filepath.Abs(l.dir); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if l.state.Hosts == 0 {
		l.state.Hosts = 2
	}
	if l.state.Hosts < 1 || l.state.Hosts > MaxHosts {
		return nil, fmt.Errorf("lab: %d hosts: 1 to %d may be asked for", o.Hosts, MaxHosts)
	}
	if l.state.Binary == "" {
		if l.state.Binary, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("lab: %w", err)
		}
	}
	if o.MemoryLimit < 0 || o.DiskLimit < 0 {
		return nil, fmt.Errorf("lab: limits of %d bytes of memory and %d of disk", o.MemoryLimit, o.DiskLimit)
	}
	if err := l.state.settleHypervisor(l.dir); err != nil {
		return nil, err
	}
	id := make([]byte, 4)
	if _, err := rand.Read(id); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	l.state.ID = hex.EncodeToString(id)
	return l, nil
}

func (l *Lab) build(ctx context.Context, noAgents bool) error {
	if err := l.save(); err != nil {
		return err
	}
	if err := l.makeFolders(); err != nil {
		return err
	}
	if err := l.makeNetwork(); err != nil {
		return err
	}
	if err := l.makeCertificates(); err != nil {
		return err
	}
	for _, host := range l.Hosts() {
		if err := l.writeAgentConfig(host); err != nil {
			return err
		}
	}
	if l.Hypervisor() == Libvirt {
		if err := l.makeLibvirtHosts(); err != nil {
			return err
		}
	}
	for _, d := range l.Daemons() {
		if d == Agent && noAgents {
			continue
		}
		if err := l.startAll(ctx, d); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("lab: up: %w", err)
	}
	l.state.Ready = true
	return l.save()
}

// Open finds the lab in a state folder (DefaultDir if empty), or ErrNone.
func Open(dir string) (*Lab, error) {
	if dir == "" {
		dir = DefaultDir
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	l := &Lab{dir: dir}
	if l.state, err = load(dir); err != nil {
		return nil, err
	}
	if !l.state.Ready {
		return nil, fmt.Errorf("%w in %s: it was left half-made; `lmctl lab down` removes it", ErrNone, dir)
	}
	return l, nil
}

func stateFile(dir string) string { return filepath.Join(dir, "lab.json") }

func load(dir string) (state, error) {
	var s state
	b, err := os.ReadFile(stateFile(dir))
	if errors.Is(err, os.ErrNotExist) {
		return s, fmt.Errorf("%w in %s", ErrNone, dir)
	}
	if err != nil {
		return s, fmt.Errorf("lab: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("lab: %s: %w", stateFile(dir), err)
	}
	if id, err := hex.DecodeString(s.ID); err != nil || len(id) != 4 || s.Hosts < 1 || s.Hosts > MaxHosts ||
		(s.Hypervisor == Libvirt) != (s.Libvirt != nil) {
		return s, fmt.Errorf("lab: %s: not a lab's", stateFile(dir))
	}
	return s, nil
}

func (l *Lab) save() error {
	b, err := json.MarshalIndent(l.state, "", "  ")
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return writeWhole(stateFile(l.dir), append(b, '\n'))
}

// writeWhole makes a file that is never seen half-written.
func writeWhole(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// lock keeps two from making and removing a lab in the same folder at a time.
func lock(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lab: %s: somebody else is at work on it: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

func (l *Lab) makeFolders() error {
	for _, dir := range []string{l.Storage(), filepath.Join(l.dir, "guests")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	memory := "mode=0700"
	if l.Hypervisor() == Libvirt {
		memory = "mode=1777" // it is /dev/shm there, and QEMU need not be root
	}
	for _, host := range l.Hosts() {
		if err := makeTmpfs(l.MemoryDir(host), memory, l.state.MemoryLimit); err != nil {
			return err
		}
		if l.state.DiskLimit > 0 {
			if err := makeTmpfs(l.DiskDir(host), "mode=0755", l.state.DiskLimit); err != nil {
				return err
			}
		}
		for _, dir := range []string{l.StateDir(host), l.RunDir(host)} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return fmt.Errorf("lab: %w", err)
			}
		}
	}
	return nil
}

// makeTmpfs mounts a file system of a size in bytes, or of half the machine's
// memory if that is 0, on a folder that it makes.
func makeTmpfs(dir, options string, size int64) error {
	if size > 0 {
		options += fmt.Sprintf(",size=%d", size)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := unix.Mount("lmctl-lab", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("lab: mount a tmpfs on %s: %w", dir, err)
	}
	return nil
}
