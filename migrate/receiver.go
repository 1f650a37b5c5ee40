package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Receiver takes guests on this host.
type Receiver struct {
	Name   string // this host's name, as its certificate says
	Host   Host
	Ledger DestinationLedger
	Log    *slog.Logger
	// PeerTimeout is how long the source may be silent; 5 s by default.
	PeerTimeout time.Duration
	// Undecided takes over a shell that is ready but lost its source before
	// the word came. The owner of the Receiver reads the source's record, then
	// calls Finish or Withdraw. It must not block.
	Undecided func(Incoming)
	// Observe, if set, is told of every change of state. It must not block.
	Observe func(Handover, State)

	mu       sync.Mutex
	sessions map[uuid.UUID]*session
}

// Incoming is a guest that is on its way to this host.
type Incoming struct {
	Handover Handover
	Shell    Shell
}

// Serve speaks the destination's side on one connection that peer, a host
// authenticated by its certificate, has opened. It closes the connection when
// it returns, with the reason if there is one.
func (r *Receiver) Serve(ctx context.Context, conn net.Conn, peer string) error {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(r.peerTimeout())); err != nil {
		return err
	}
	p, err := readPreamble(conn)
	if err != nil {
		return fmt.Errorf("migrate: host %q: %w", peer, err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if p.role == roleData {
		err = r.serveData(conn, p, peer)
	} else {
		err = r.serveControl(ctx, conn, p, peer)
	}
	if err != nil {
		return fmt.Errorf("migrate: host %q: %w", peer, err)
	}
	return nil
}

func (r *Receiver) peerTimeout() time.Duration {
	if r.PeerTimeout > 0 {
		return r.PeerTimeout
	}
	return DefaultPeerTimeout
}

func (r *Receiver) log() *slog.Logger {
	if r.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return r.Log
}

// Active says whether a migration is being received on a live connection.
func (r *Receiver) Active(id string) bool {
	u, err := uuid.Parse(id)
	if err != nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sessions[u] != nil
}

func (r *Receiver) serveData(conn net.Conn, p preamble, peer string) error {
	r.mu.Lock()
	s := r.sessions[p.id]
	r.mu.Unlock()
	if s == nil || s.peer != peer {
		return violation("data stream for a migration that was not offered")
	}
	return s.serveData(conn, int(p.index))
}

func (r *Receiver) serveControl(ctx context.Context, conn net.Conn, p preamble, peer string) error {
	s := &session{
		r: r, id: p.id, peer: peer, gate: newGate(),
		ctl: newControl(conn, r.peerTimeout()), word: make(chan controlType, 1), halted: make(chan struct{}),
		conns: make(map[int]net.Conn), log: r.log().With("migration", p.id.String(), "source", peer),
	}
	defer s.ctl.close()
	// A host that stops does not wait for a source that says nothing of use.
	// Once the shell is prepared, the session itself does what ctx's end asks.
	defer context.AfterFunc(ctx, func() {
		if !s.prepared.Load() {
			conn.Close()
		}
	})()
	r.mu.Lock()
	taken := r.sessions[p.id] != nil
	if !taken {
		if r.sessions == nil {
			r.sessions = make(map[uuid.UUID]*session)
		}
		r.sessions[p.id] = s
	}
	r.mu.Unlock()
	if taken {
		return violation("migration %s is under way already", p.id)
	}
	undecided, err := s.run(ctx)
	// The session leaves the list before anyone asks the source about it, so
	// that Active means what it says.
	r.mu.Lock()
	delete(r.sessions, p.id)
	r.mu.Unlock()
	if undecided {
		r.enter(s.offer.Handover, DestUndecided)
		r.Undecided(s.incoming())
	}
	return err
}

func (r *Receiver) enter(h Handover, s State) {
	r.log().Debug("migration state", "guest", h.Guest, "migration", h.ID, "state", s)
	if r.Observe != nil {
		r.Observe(h, s)
	}
	failpoint("destination", s)
}

// finishTimeout bounds the start of the vCPUs of a guest that this host owns.
const finishTimeout = 30 * time.Second

// Finish runs a shell whose handover is certain: it notes that, starts the
// vCPUs, makes the ownership durable and announces the guest. When no vCPU
// could be started, it withdraws; the error then has ErrNotStarted in its
// chain.
func (r *Receiver) Finish(ctx context.Context, in Incoming) error {
	return r.finish(ctx, in, func(controlType, any) {})
}

// finish does what Finish says and tells the source of each step.
func (r *Receiver) finish(ctx context.Context, in Incoming, tell func(controlType, any)) error {
	// A guest that is ours is started, whoever has lost interest in it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
	defer cancel()
	h := in.Handover
	if err := r.Ledger.Accept(ctx, h); err != nil {
		return r.giveBack(ctx, in, fmt.Errorf("note the start: %w", errors.Join(ErrNotStarted, err)), tell)
	}
	r.enter(h, DestAccepted)
	begin := time.Now()
	resumed := in.Shell.Resume(ctx)
	if errors.Is(resumed, ErrNotStarted) {
		return r.giveBack(ctx, in, resumed, tell)
	}
	if resumed != nil {
		// It may have run, so it can never run at the source again: it is this
		// host's guest, in whatever state it is.
		resumed = fmt.Errorf("resume: %w", resumed)
	}
	running := runningMsg{Resume: time.Since(begin)}
	if resumed != nil {
		running.Error = resumed.Error()
	}
	tell(ctlRunning, running)
	announced := make(chan announcedMsg, 1)
	go func() { announced <- announce(ctx, in.Shell) }()
	r.enter(h, DestRunning)
	owned := r.Ledger.Own(ctx, h)
	if owned == nil {
		r.enter(h, DestOwned)
		tell(ctlOwned, nil)
	} else {
		owned = fmt.Errorf("make the ownership durable: %w", owned)
	}
	a := <-announced
	tell(ctlAnnounced, a)
	if a.Error != "" {
		r.log().Warn("the guest's new place was not announced everywhere", "guest", h.Guest, "error", a.Error)
	}
	return errors.Join(resumed, owned)
}

func announce(ctx context.Context, s Shell) announcedMsg {
	n, err := s.Announce(ctx)
	if err != nil {
		return announcedMsg{Addresses: n, Error: err.Error()}
	}
	return announcedMsg{Addresses: n}
}

// giveBack withdraws from a handover whose shell cannot be started.
func (r *Receiver) giveBack(ctx context.Context, in Incoming, cause error, tell func(controlType, any)) error {
	if err := r.Withdraw(ctx, in); err != nil {
		// Whoever settles the guest later finds the shell by its record, and
		// must not find it held by us.
		if held, ok := in.Shell.(io.Closer); ok {
			err = errors.Join(err, held.Close())
		}
		return errors.Join(cause, err)
	}
	tell(ctlWithdrawn, reasonMsg{Reason: cause.Error()})
	return cause
}

// Withdraw notes durably that a shell never ran and never will, so that the
// source may take the guest back, and destroys it. The note comes first: a
// shell that an agent which died in between has left says that it may go, while
// a missing one would say nothing about whether it ran.
func (r *Receiver) Withdraw(ctx context.Context, in Incoming) error {
	if err := r.Ledger.Withdraw(ctx, in.Handover); err != nil {
		return fmt.Errorf("withdraw from guest %q: %w", in.Handover.Guest, err)
	}
	if err := in.Shell.Destroy(ctx); err != nil {
		return fmt.Errorf("destroy the shell of guest %q: %w", in.Handover.Guest, err)
	}
	r.enter(in.Handover, DestWithdrawn)
	return nil
}
