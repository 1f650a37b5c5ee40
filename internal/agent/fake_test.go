package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/qemu"
	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/migrate"
)

// fakeDriver is a hypervisor without processes, for what the real one cannot
// be brought into.
type fakeDriver struct {
	mu     sync.Mutex
	guests map[string]*hypervisor.Info
	told   []string // what was done, in order
	// held, if set, has a migration wait in its first question until its end.
	held    chan struct{}
	movable bool // says Examine
	// seen, if set, is what watchers see.
	seen chan hypervisor.Info
	// met, if set, is closed when the hypervisor can be asked.
	met chan struct{}
}

func (d *fakeDriver) Connected() bool {
	if d.met == nil {
		return true
	}
	select {
	case <-d.met:
		return true
	default:
		return false
	}
}

func (d *fakeDriver) AwaitConnection(ctx context.Context) error {
	if d.met == nil {
		return nil
	}
	select {
	case <-d.met:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *fakeDriver) did(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.told = append(d.told, fmt.Sprintf(format, args...))
}

func (d *fakeDriver) history() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.told...)
}

func (d *fakeDriver) set(name string, change func(*hypervisor.Info)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	info := d.guests[name]
	if info == nil {
		info = &hypervisor.Info{Name: name, UUID: "uuid-" + name, State: hypervisor.StateStopped}
		d.guests[name] = info
	}
	change(info)
}

func (d *fakeDriver) remove(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.guests, name)
}

func (d *fakeDriver) Adopt(context.Context) error { return nil }
func (d *fakeDriver) Close() error                { return nil }

func (d *fakeDriver) Define(text []byte) (hypervisor.Info, error) {
	name, uuid, err := d.Identify(text)
	if err != nil {
		return hypervisor.Info{}, err
	}
	d.set(name, func(i *hypervisor.Info) { i.UUID = uuid })
	return d.Get(name)
}

func (d *fakeDriver) Identify(text []byte) (name, uuid string, err error) {
	def, err := qemu.ParseDefinition(text)
	if err != nil {
		return "", "", err
	}
	return def.Name, def.UUID, nil
}

func (d *fakeDriver) Definition(name string) ([]byte, error) {
	i, err := d.Get(name)
	if err != nil {
		return nil, err
	}
	def := qemu.Definition{Name: i.Name, UUID: i.UUID, Memory: 1 << 20, VCPUs: 1}
	return def.YAML()
}

func (d *fakeDriver) Undefine(name string) error {
	d.did("undefine %s", name)
	d.remove(name)
	return nil
}

func (d *fakeDriver) Start(_ context.Context, name string) error {
	d.set(name, func(i *hypervisor.Info) { i.State, i.PID = hypervisor.StateRunning, 1 })
	return nil
}

func (d *fakeDriver) Stop(context.Context, string, time.Duration) error {
	return hypervisor.ErrStillRunning
}

func (d *fakeDriver) Destroy(_ context.Context, name string) error {
	d.set(name, func(i *hypervisor.Info) { i.State, i.PID = hypervisor.StateStopped, 0 })
	return nil
}

func (d *fakeDriver) List() []hypervisor.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []hypervisor.Info
	for _, i := range d.guests {
		all = append(all, *i)
	}
	return all
}

func (d *fakeDriver) Get(name string) (hypervisor.Info, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if i := d.guests[name]; i != nil {
		return *i, nil
	}
	return hypervisor.Info{}, fmt.Errorf("guest %s: %w", name, hypervisor.ErrNotFound)
}

func (d *fakeDriver) Watch(ctx context.Context) <-chan hypervisor.Info {
	out := make(chan hypervisor.Info)
	go func() {
		defer close(out)
		for {
			select {
			case info := <-d.seen:
				out <- info
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

func (d *fakeDriver) Prepare(context.Context, migrate.Offer) (migrate.Shell, error) {
	return nil, &migrate.Refusal{Reasons: []string{"this host is a fake"}}
}

func (d *fakeDriver) Examine(_ context.Context, o migrate.Offer) (hypervisor.Checks, error) {
	d.did("examine %s of %s with %q", o.Guest, o.Source, o.Definition)
	var c hypervisor.Checks
	c.Pass("memory", "enough")
	c.Warn("bridge br0", "it is\x1b[2J down", "set it up")
	return c, nil
}

func (d *fakeDriver) Source(name string) (hypervisor.Source, error) {
	if _, err := d.Get(name); err != nil {
		return nil, err
	}
	return &fakeGuest{d: d, name: name}, nil
}

func (d *fakeDriver) ShellOf(name string) (hypervisor.Shell, bool, error) {
	if _, err := d.Get(name); err != nil {
		return nil, false, err
	}
	return &fakeShell{d: d, name: name, lost: make(chan struct{})}, false, nil
}

// fakeGuest can do what the settler asks of a guest; the engine's questions it
// does not answer.
type fakeGuest struct {
	migrate.Guest
	d    *fakeDriver
	name string
}

func (g *fakeGuest) Name() string          { return g.name }
func (g *fakeGuest) Prepared([]byte) error { return nil }

func (g *fakeGuest) UUID() string { return "uuid-" + g.name }
func (g *fakeGuest) Close() error { return nil }
func (g *fakeGuest) Movable(ctx context.Context) error {
	if g.d.held != nil {
		close(g.d.held)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return &migrate.Refusal{Reasons: []string{"it has a device that cannot move"}}
}

func (g *fakeGuest) Examine(context.Context) (*hypervisor.Examination, error) {
	var e hypervisor.Examination
	e.Any.Pass("state", "running")
	if g.d.movable {
		e.Direct.Pass("devices", "none in the way")
	} else {
		e.Direct.Fail("device", "it has a device that cannot move", "detach it")
	}
	return &e, nil
}

func (g *fakeGuest) Definition(context.Context) ([]byte, error) { return []byte("of " + g.name), nil }

func (g *fakeGuest) Process() migrate.Process { return migrate.Process{PID: -1, PIDFD: -1} }

func (g *fakeGuest) Resume(context.Context) error {
	g.d.did("resume %s", g.name)
	g.d.set(g.name, func(i *hypervisor.Info) { i.State, i.Suspended = hypervisor.StateRunning, false })
	return nil
}

func (g *fakeGuest) Suspend(context.Context, io.Writer) (time.Time, error) {
	g.d.did("suspend %s", g.name)
	g.d.set(g.name, func(i *hypervisor.Info) { i.State, i.Suspended = hypervisor.StateMigrating, true })
	return time.Now(), nil
}

func (g *fakeGuest) Release(context.Context) error {
	g.d.did("release %s", g.name)
	g.d.remove(g.name)
	return nil
}

type fakeShell struct {
	d    *fakeDriver
	name string
	lost chan struct{}
}

func (s *fakeShell) Answer() []byte { return nil }

func (s *fakeShell) Memory() []migrate.Memory                              { return nil }
func (s *fakeShell) LoadState(context.Context, io.Reader, io.Writer) error { return nil }
func (s *fakeShell) Announce(context.Context) (int, error)                 { return 0, nil }
func (s *fakeShell) Lost() <-chan struct{}                                 { return s.lost }
func (s *fakeShell) Close() error                                          { return nil }
func (s *fakeShell) Resume(context.Context) error {
	s.d.did("run %s", s.name)
	s.d.set(s.name, func(i *hypervisor.Info) { i.State = hypervisor.StateRunning })
	return nil
}

func (s *fakeShell) Destroy(context.Context) error {
	s.d.did("destroy the shell of %s", s.name)
	s.d.remove(s.name)
	return nil
}

// site is some hosts with one authority.
type site struct {
	t     *testing.T
	ca    string
	peers map[string]string
}

// newSite reserves an address for each host.
func newSite(t *testing.T, hosts ...string) *site {
	t.Helper()
	s := &site{t: t, ca: filepath.Join(t.TempDir(), "ca"), peers: make(map[string]string)}
	if err := pki.Init(s.ca); err != nil {
		t.Fatal(err)
	}
	for _, host := range hosts {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.peers[host] = ln.Addr().String()
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *site) issue(role pki.Role, name string) pki.Files {
	s.t.Helper()
	dir := filepath.Join(s.t.TempDir(), name)
	if err := pki.Issue(s.ca, pki.Request{Role: role, Name: name}, dir); err != nil {
		s.t.Fatal(err)
	}
	return pki.FilesIn(dir)
}

func (s *site) identity(role pki.Role, name string) *pki.Identity {
	s.t.Helper()
	id, err := pki.Load(s.issue(role, name))
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}

func (s *site) config(host string) Config {
	s.t.Helper()
	cfg, err := DefaultConfig()
	if err != nil {
		s.t.Fatal(err)
	}
	dir, files := s.t.TempDir(), s.issue(pki.Host, host)
	cfg.Name, cfg.Listen, cfg.Metrics = host, s.peers[host], ""
	cfg.Socket, cfg.StateDir, cfg.RunDir, cfg.MemoryDir = filepath.Join(dir, "agent.sock"), filepath.Join(dir, "state"), filepath.Join(dir, "run"), filepath.Join(dir, "memory")
	cfg.TLS = TLSConfig{CA: files.CA, Cert: files.Cert, Key: files.Key}
	for name, addr := range s.peers {
		if name != host {
			cfg.Peers[name] = addr
		}
	}
	return cfg
}

// agent makes an agent with a fake driver that does not serve yet.
func (s *site) agent(cfg Config, d *fakeDriver) *Agent {
	s.t.Helper()
	a, err := newAgent(s.t.Context(), cfg, "test", slog.New(slog.DiscardHandler), func(*Agent) (hypervisor.Driver, error) { return d, nil })
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := a.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return a
}

// serve runs an agent until the test ends, and returns once it answers.
func (s *site) serve(a *Agent) *api.Client {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, context.Background()) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Error(err)
		}
	})
	for {
		conn, err := net.Dial("unix", a.cfg.Socket)
		if err == nil {
			if err := conn.Close(); err != nil {
				s.t.Fatal(err)
			}
			break
		}
		select {
		case err := <-done:
			done <- nil
			s.t.Fatalf("the agent has ended: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return s.client(api.Target{Socket: a.cfg.Socket})
}

func (s *site) client(t api.Target) *api.Client {
	s.t.Helper()
	c, err := api.Dial(t)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return c
}

func newFake() *fakeDriver { return &fakeDriver{guests: make(map[string]*hypervisor.Info)} }
