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

	"github.com/lmctl/lmctl/internal/ledger"
	"github.com/lmctl/lmctl/migrate"
)

// inbound follows the migrations to this host.
type inbound struct {
	a *Agent

	mu     sync.Mutex
	guests map[string]string // by migration
	conns  int
	none   chan struct{} // closed while there are no connections
}

func newInbound(a *Agent) *inbound {
	none := make(chan struct{})
	close(none)
	return &inbound{a: a, guests: make(map[string]string), none: none}
}

// observe is the receiver's Observe.
func (in *inbound) observe(h migrate.Handover, s migrate.State) {
	in.a.log.Info("incoming migration", "guest", h.Guest, "migration", h.ID, "source", h.Source, "state", s)
	in.mu.Lock()
	in.guests[h.ID] = h.Guest
	in.mu.Unlock()
}

// serve serves a connection of the data plane. When it was a migration's
// control connection, what is left open afterwards is settled.
func (in *inbound) serve(ctx context.Context, conn net.Conn, host string) {
	in.enter()
	defer in.leave()
	if err := in.a.receiver.Serve(ctx, conn, host); err != nil {
		in.a.log.Warn("incoming migration ended", "source", host, "error", err)
	}
	for _, guest := range in.ended() {
		in.a.settler.kick(guest)
	}
}

func (in *inbound) enter() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.conns++; in.conns == 1 {
		in.none = make(chan struct{})
	}
}

func (in *inbound) leave() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.conns--; in.conns == 0 {
		close(in.none)
	}
}

// ended forgets the migrations that are over and returns their guests.
func (in *inbound) ended() []string {
	in.mu.Lock()
	defer in.mu.Unlock()
	var guests []string
	for id, guest := range in.guests {
		if !in.a.receiver.Active(id) {
			guests = append(guests, guest)
			delete(in.guests, id)
		}
	}
	return guests
}

// busy says whether a guest is being received right now.
func (in *inbound) busy(guest string) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	for id, g := range in.guests {
		if g == guest && in.a.receiver.Active(id) {
			return true
		}
	}
	return false
}

func (in *inbound) count() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.conns
}

// wait returns when no migration comes in or ctx ends.
func (in *inbound) wait(ctx context.Context) {
	in.mu.Lock()
	none := in.none
	in.mu.Unlock()
	select {
	case <-none:
	case <-ctx.Done():
	}
}

// definitions keeps the definitions of guests that are on their way here. The
// driver forgets a shell whose process has ended, but if it had been accepted
// it is this host's guest, to be kept as one that has crashed.
type definitions struct {
	mu   sync.Mutex
	text map[string][]byte
}

func newDefinitions() *definitions { return &definitions{text: make(map[string][]byte)} }

// readAll reads the definitions of what an earlier agent was receiving. It is
// called before the driver looks at the folder.
func (d *definitions) readAll(dir string, records []ledger.Record, log *slog.Logger) {
	for _, r := range records {
		switch r.State {
		case ledger.Prepared, ledger.Accepted, ledger.Owned:
		default:
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, r.Guest, "definition.yaml"))
		if err != nil {
			log.Debug("no definition to keep", "guest", r.Guest, "error", err)
			continue
		}
		d.keep(r.Guest, text)
	}
}

func (d *definitions) keep(guest string, text []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.text[guest] = text
}

func (d *definitions) get(guest string) ([]byte, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	text, ok := d.text[guest]
	return text, ok
}

// keepingHost is the driver as the receiver sees it.
type keepingHost struct{ a *Agent }

func (h keepingHost) Prepare(ctx context.Context, offer migrate.Offer) (migrate.Shell, error) {
	shell, err := h.a.driver.Prepare(ctx, offer)
	if err != nil {
		return nil, err
	}
	if err := h.keep(offer.Guest); err != nil {
		return nil, errors.Join(err, shell.Destroy(context.WithoutCancel(ctx)))
	}
	return shell, nil
}

func (h keepingHost) keep(guest string) error {
	info, err := h.a.driver.Get(guest)
	if err != nil {
		return fmt.Errorf("agent: definition of guest %s: %w", guest, err)
	}
	text, err := info.Definition.YAML()
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	h.a.kept.keep(guest, text)
	return nil
}
