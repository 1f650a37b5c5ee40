package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/api"
	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/internal/pki"
	"github.com/lmctl/lmctl/migrate"
)

// Agent is the daemon of one host.
type Agent struct {
	cfg     Config
	version string
	log     *slog.Logger
	began   time.Time

	lock     *os.File // of the state folder
	identity *pki.Identity
	ledger   *ledger.Ledger
	driver   hypervisor.Driver
	receiver *migrate.Receiver
	sender   *migrate.Sender
	metrics  *metrics
	peers    *peers
	settler  *settler
	moves    *moves
	inbound  *inbound
	kept     *definitions

	examining chan struct{} // full while others may not ask about guests

	following sync.Mutex // held while a foreign guest's record follows it

	life   context.Context // ends when the agent stops for good
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// New puts an agent together: it takes the state folder, adopts the guests and
// settles what it can by itself. After it, Run or Close must be called.
func New(ctx context.Context, cfg Config, version string, log *slog.Logger) (_ *Agent, err error) {
	return newAgent(ctx, cfg, version, log, (*Agent).newDriver)
}

func newAgent(ctx context.Context, cfg Config, version string, log *slog.Logger, makeDriver func(*Agent) (hypervisor.Driver, error)) (_ *Agent, err error) {
	a := &Agent{cfg: cfg, version: version, log: log.With("host", cfg.Name), began: time.Now(), examining: make(chan struct{}, maxExaminations)}
	a.life, a.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	if err := a.openState(); err != nil {
		return nil, err
	}
	if err := a.loadIdentity(); err != nil {
		return nil, err
	}
	a.metrics = newMetrics(a)
	a.peers = newPeers(a)
	a.settler = newSettler(a)
	a.inbound = newInbound(a)
	if a.kept, err = openDefinitions(filepath.Join(cfg.StateDir, "incoming")); err != nil {
		return nil, err
	}
	a.kept.readAll(filepath.Join(cfg.StateDir, "guests"), a.ledger.List(), a.log)
	if a.moves, err = newMoves(a); err != nil {
		return nil, err
	}
	if a.driver, err = makeDriver(a); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a.receiver = &migrate.Receiver{
		Name: cfg.Name, Host: keepingHost{a}, Ledger: a.ledger, Log: a.log, PeerTimeout: cfg.PeerTimeout,
		Undecided: a.settler.undecided, Observe: a.inbound.observe,
	}
	a.sender = &migrate.Sender{
		Host: cfg.Name, Ledger: a.ledger, Log: a.log, PeerTimeout: cfg.PeerTimeout,
		Track: func(p migrate.Process, regions []dirtymap.Region) (migrate.Tracker, error) {
			return dirtymap.Attach(p, regions)
		},
	}
	if err := a.driver.Adopt(ctx); err != nil {
		a.log.Error("not every guest could be adopted", "error", err)
	}
	a.cleanTrackers()
	a.settler.begin(ctx)
	return a, nil
}

// openState takes the state folder for this process and opens the ledger.
func (a *Agent) openState() error {
	for _, dir := range []string{a.cfg.StateDir, a.cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	if a.foreign() { // libvirt's QEMU reaches its sockets below, as its own user
		if err := os.Chmod(a.cfg.RunDir, 0o711); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	path := filepath.Join(a.cfg.StateDir, "agent.lock")
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	a.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("agent: another agent has the state folder %s; stop it first, or give this one a folder of its own", a.cfg.StateDir)
		}
		return fmt.Errorf("agent: lock %s: %w", path, err)
	}
	boot, err := ledger.BootID()
	if err != nil {
		return err
	}
	a.ledger, err = ledger.Open(filepath.Join(a.cfg.StateDir, "ledger"), a.cfg.Name, boot, a.log)
	return err
}

// loadIdentity reads the certificate, unless the agent talks to nobody.
func (a *Agent) loadIdentity() error {
	if a.cfg.Listen == "" && len(a.cfg.Peers) == 0 {
		return nil
	}
	id, err := pki.Load(pki.Files{CA: a.cfg.TLS.CA, Cert: a.cfg.TLS.Cert, Key: a.cfg.TLS.Key})
	if err != nil {
		return fmt.Errorf("agent: certificate (make one with `lmctl pki issue host %s`, or set listen to \"\"): %w", a.cfg.Name, err)
	}
	if id.Role != pki.Host || id.Name != a.cfg.Name {
		return fmt.Errorf("agent: certificate %s is for %s %s, but this is host %s", a.cfg.TLS.Cert, id.Role, id.Name, a.cfg.Name)
	}
	a.identity = id
	return nil
}

// Run serves until ctx ends, then stops gracefully: it takes on nothing new and
// waits for migrations, for as long as the configuration says or until hurry
// ends, and cancels those that are left. The guests go on.
func (a *Agent) Run(ctx, hurry context.Context) error {
	defer a.cancel()
	local, err := listenUnix(a.cfg.Socket)
	if err != nil {
		return err
	}
	server := a.newServer()
	var group errgroup.Group
	group.Go(func() error { return serveAPI(server, local) })
	var port *mux
	if a.cfg.Listen != "" {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", a.cfg.Listen)
		if err != nil {
			server.Stop()
			return errors.Join(fmt.Errorf("agent: listen: %w", err), group.Wait())
		}
		port = newMux(ln, a.identity, a.cfg.Limits, a.log)
		port.migrate = a.inbound.serve
		group.Go(func() error { return port.run(a.life) })
		group.Go(func() error { return serveAPI(server, port) })
	}
	metrics, err := a.metrics.listen(a.cfg.Metrics)
	if err != nil {
		server.Stop()
		return errors.Join(err, closePort(port), group.Wait())
	}
	a.settler.connect()
	a.log.Info("agent is ready", "version", a.version, "listen", a.cfg.Listen, "socket", a.cfg.Socket, "guests", len(a.driver.List()))
	watchdog := a.notifyReady()

	failed := make(chan error, 1)
	go func() { failed <- group.Wait() }()
	select {
	case <-ctx.Done():
	case err = <-failed:
		failed <- nil
	}
	a.notifyStopping()
	a.stop(hurry, port)
	a.cancel()
	stopServer(server)
	err = errors.Join(err, closePort(port), <-failed, metrics.Close(), watchdog.Close())
	a.log.Info("agent has stopped")
	return err
}

// stop waits for migrations, then cancels them and waits for that.
func (a *Agent) stop(hurry context.Context, port *mux) {
	a.moves.refuse()
	if port != nil {
		if err := port.close(); err != nil {
			a.log.Warn("close the port", "error", err)
		}
	}
	wait, cancel := context.WithTimeout(hurry, a.cfg.StopTimeout)
	defer cancel()
	a.log.Info("agent is stopping", "migrations", a.moves.active(), "incoming", a.inbound.count())
	if !a.moves.wait(wait) {
		a.log.Warn("cancelling migrations", "migrations", a.moves.active())
		a.moves.cancelAll()
		a.moves.wait(context.WithoutCancel(hurry))
	}
	a.inbound.wait(wait)
}

// lastWords is how long calls under way may take to end when the agent stops.
const lastWords = 3 * time.Second

// stopServer ends the API. Those who watched a migration hear how it ended.
func stopServer(server *grpc.Server) {
	ended := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(ended)
	}()
	timer := time.NewTimer(lastWords)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
		server.Stop()
		<-ended
	}
}

// untilStop is a call's context that ends with the agent's life too, for calls
// that would not end by themselves.
func (a *Agent) untilStop(call context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(call)
	over := context.AfterFunc(a.life, cancel)
	return ctx, func() { over(); cancel() }
}

func closePort(port *mux) error {
	if port == nil {
		return nil
	}
	return port.close()
}

// Close lets go of everything. The guests go on.
func (a *Agent) Close() error {
	a.cancel()
	a.wg.Wait()
	var errs []error
	if a.driver != nil {
		errs = append(errs, a.driver.Close())
	}
	if a.peers != nil {
		errs = append(errs, a.peers.close())
	}
	if a.ledger != nil {
		errs = append(errs, a.ledger.Close())
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
	}
	return errors.Join(errs...)
}

func (a *Agent) newServer() *grpc.Server {
	s := grpc.NewServer(
		grpc.Creds(handshaken{}),
		grpc.ChainUnaryInterceptor(authorizeUnary, a.errorsUnary),
		grpc.ChainStreamInterceptor(authorizeStream, a.errorsStream),
		grpc.MaxRecvMsgSize(api.MaxMessage),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: api.KeepaliveTime / 2, PermitWithoutStream: true}),
	)
	lmctlv1.RegisterGuestsServer(s, &guestService{a: a})
	lmctlv1.RegisterMigrationsServer(s, &migrationService{a: a})
	lmctlv1.RegisterHostsServer(s, &hostService{a: a})
	lmctlv1.RegisterPeerServer(s, &peerService{a: a})
	return s
}

func serveAPI(s *grpc.Server, ln net.Listener) error {
	if err := s.Serve(ln); err != nil && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("agent: API: %w", err)
	}
	return nil
}

// listenUnix makes the agent's socket. The state folder's lock says that no
// other agent of this configuration uses it, so that one that is there is left
// from before.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	if conn, err := net.Dial("unix", path); err == nil {
		return nil, errors.Join(fmt.Errorf("agent: another agent answers at %s", path), conn.Close())
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("agent: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("agent: %w", err), ln.Close())
	}
	return ln, nil
}
