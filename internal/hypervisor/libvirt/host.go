package libvirt

import (
	"context"
	"errors"
	"fmt"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate"
)

// Prepare checks that this host can take the offered domain and has libvirt make
// its shell: a QEMU that waits for the guest's state, with all of its memory
// holes. What this host lacks is a *migrate.Refusal with every reason. On an
// error nothing is left.
func (d *Driver) Prepare(ctx context.Context, offer migrate.Offer) (migrate.Shell, error) {
	s, err := d.prepare(ctx, offer)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func refusal(format string, args ...any) *migrate.Refusal {
	return &migrate.Refusal{Reasons: []string{fmt.Sprintf(format, args...)}}
}

func (d *Driver) prepare(ctx context.Context, in migrate.Offer) (*Shell, error) {
	o, x, err := understand(in)
	if err != nil {
		return nil, err
	}
	l, err := d.conn.get()
	if err != nil {
		return nil, fmt.Errorf("prepare guest %s: %w", x.Name, err)
	}
	if err := d.makeRoom(ctx, x.Name, x.UUID); err != nil {
		return nil, fmt.Errorf("prepare guest %s: %w", x.Name, err)
	}
	checks, err := d.examine(ctx, l, o, x)
	if err != nil {
		return nil, fmt.Errorf("prepare guest %s: %w", x.Name, err)
	}
	if err := checks.Refusal(); err != nil {
		return nil, err
	}
	s, err := d.buildShell(ctx, l, o, x, in)
	if err != nil {
		return nil, fmt.Errorf("prepare guest %s: %w", x.Name, err)
	}
	return s, nil
}

// understand reads an offer. What is wrong with it is a *migrate.Refusal.
func understand(in migrate.Offer) (*offer, *libvirtxml.Domain, error) {
	o, x, err := parseOffer(in.Definition)
	if err != nil {
		return nil, nil, refusal("the guest's description cannot be read: %v", err)
	}
	if x.Name != in.Guest || x.UUID != in.UUID {
		return nil, nil, refusal("the description is of guest %s (%s), the offer of %q (%q)", x.Name, x.UUID, in.Guest, in.UUID)
	}
	return o, x, nil
}

// roomTimeout is how long an earlier shell of the same guest may take to go:
// libvirt takes a second or two to end a QEMU.
const roomTimeout = 10 * time.Second

// makeRoom waits until the shell of an earlier migration of the guest is gone.
func (d *Driver) makeRoom(ctx context.Context, name, id string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, roomTimeout, errors.New("what an earlier migration left here is not gone yet; try again"))
	defer cancel()
	for {
		g, err := d.lookup(name)
		if err != nil || g.uuid != id || g.info().State != hypervisor.StateIncoming {
			return nil
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// expect notes a domain that is on its way here.
func (d *Driver) expect(o *offer, x *libvirtxml.Domain) (*domain, func(), error) {
	f, err := parseFacts(o.XML)
	if err != nil {
		return nil, nil, err
	}
	f.cards, f.offered = nil, true
	g := d.newDomain(x.Name, x.UUID)
	g.facts, g.incoming, g.brought = f, true, o.Cards
	done, err := g.begin("incoming migration")
	if err != nil {
		return nil, nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.domains[x.Name] != nil {
		return nil, nil, refusal("guest %s cannot come here: %v", x.Name, hypervisor.ErrExists)
	}
	d.domains[x.Name] = g
	return g, done, nil
}

func (d *Driver) buildShell(ctx context.Context, l *link, o *offer, x *libvirtxml.Domain, in migrate.Offer) (_ *Shell, err error) {
	g, done, err := d.expect(o, x)
	if err != nil {
		return nil, err
	}
	s := &Shell{g: g, l: l, done: done, record: shellRecord{
		Name: g.name, UUID: g.uuid, Persistent: o.Persistent, Autostart: o.Autostart, Cards: o.Cards,
	}, definition: o.XML}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Destroy(context.WithoutCancel(ctx)))
		}
	}()
	g.mu.Lock()
	g.shell = s
	g.mu.Unlock()
	// Whatever an earlier migration left says nothing of this one.
	if err := errors.Join(g.files.remove(), write(g.files.shell(), s.record)); err != nil {
		return nil, err
	}
	if s.activates, err = activates(ctx, l); err != nil {
		return nil, err
	}
	uid, gid, err := userOf(ctx, l, x)
	if err != nil {
		return nil, err
	}
	dir, err := g.files.streamFolder(uid, gid)
	if err != nil {
		return nil, err
	}
	s.socket = incomingSocket(dir)
	parameters := []lv.TypedParam{
		text("destination_name", g.name), text("destination_xml", o.XML), text("migrate_uri", "unix://"+s.socket),
	}
	s.cookie, err = call(ctx, l, func(l *link) ([]byte, error) {
		cookie, _, err := l.DomainMigratePrepare3Params(parameters, o.Cookie, uint32(migrateFlags))
		return cookie, err
	})
	// Where libvirt has refused, what there may be of the domain is another
	// hand's; where it did not answer, it may be ours.
	s.prepared = err == nil || ctx.Err() != nil || errors.Is(err, errDisconnected)
	if err != nil {
		return nil, fmt.Errorf("libvirt cannot take it: %w", err)
	}
	return s, s.find(ctx, in)
}

// find finds the shell's process and, unless QEMU fills it itself, its memory.
func (s *Shell) find(ctx context.Context, in migrate.Offer) error {
	if err := s.g.look(ctx, s.l); err != nil {
		return err
	}
	s.g.mu.Lock()
	s.proc = s.g.proc
	s.g.mu.Unlock()
	if s.proc == nil {
		return errNoProcess
	}
	s.record.PID, s.record.Start = s.proc.pid, s.proc.start
	if err := write(s.g.files.shell(), s.record); err != nil {
		return err
	}
	if in.Mode == migrate.Relay {
		return nil
	}
	memory, err := s.proc.blocks()
	if err != nil {
		return err
	}
	s.memory = memory
	if len(memory) != len(in.Blocks) {
		return refusal("the guest has %d blocks of memory here and %d at the source; give both the same memory backing", len(memory), len(in.Blocks))
	}
	for _, b := range in.Blocks {
		if !has(memory, b) {
			return refusal("there is no memory %s of %d bytes here; give the guest the same memory backing as at the source", b.Name, b.Size)
		}
	}
	return nil
}

func has(memory []migrate.Memory, b migrate.BlockInfo) bool {
	for _, m := range memory {
		if m.Name == b.Name && m.Size == b.Size {
			return true
		}
	}
	return false
}
