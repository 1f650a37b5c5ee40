package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
		in.a.know(in.a.life, guest) // another hand may have brought it meanwhile
		in.a.settler.forgetDefinition(guest)
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
	// dir has them for the next agent: the driver's folder of a shell goes with
	// the shell.
	dir string

	mu   sync.Mutex
	text map[string][]byte
}

const keptSuffix = ".yaml"

func openDefinitions(dir string) (*definitions, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("agent: definitions of incoming guests: %w", err)
	}
	d := &definitions{dir: dir, text: make(map[string][]byte)}
	for _, e := range entries {
		guest, ok := strings.CutSuffix(e.Name(), keptSuffix)
		if !ok || ledger.CheckGuest(guest) != nil {
			continue
		}
		if d.text[guest], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			return nil, fmt.Errorf("agent: definition of an incoming guest: %w", err)
		}
	}
	return d, nil
}

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
		d.mu.Lock()
		d.text[r.Guest] = text
		d.mu.Unlock()
	}
}

// keep keeps a definition durably.
func (d *definitions) keep(guest string, text []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := writeDurably(filepath.Join(d.dir, guest+keptSuffix), text); err != nil {
		return fmt.Errorf("agent: keep the definition of guest %s: %w", guest, err)
	}
	d.text[guest] = text
	return nil
}

// writeDurably replaces a file: after a crash of the host it has the old content
// or the new one.
func writeDurably(path string, text []byte) (err error) {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// forget removes a definition that is not needed any more. It is not called of a
// guest that comes in: that one's would be lost.
func (d *definitions) forget(guest string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, kept := d.text[guest]; !kept {
		return nil
	}
	if err := os.Remove(filepath.Join(d.dir, guest+keptSuffix)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("agent: %w", err)
	}
	delete(d.text, guest)
	return nil
}

// names are the guests whose definitions are kept.
func (d *definitions) names() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.text))
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
	text, err := h.a.driver.Definition(guest)
	if err != nil {
		return fmt.Errorf("agent: definition of guest %s: %w", guest, err)
	}
	return h.a.kept.keep(guest, text)
}
