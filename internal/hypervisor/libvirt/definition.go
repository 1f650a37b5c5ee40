package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// A domain that runs and has no definition, as one that has just come here, is
// forgotten by libvirt when that cannot write the definition it is given, while
// its QEMU goes on (seen with 9.0 and a full disk). Once forgotten, the domain
// could be defined and started a second time. So libvirt is not asked where there
// is next to no room, and nothing is defined or started of which a QEMU runs that
// libvirt does not know.

// definitionRoom is how many bytes are to be free where libvirt writes a
// definition: many times what one takes, so that somebody else who writes at the
// same time does not take it all.
const definitionRoom = 1 << 20

// defineXML has libvirt define a domain.
func (d *Driver) defineXML(ctx context.Context, l *link, name, id, text string) (lv.Domain, error) {
	if err := d.notForgotten(ctx, l, name, id); err != nil {
		return lv.Domain{}, err
	}
	if err := roomToDefine(d.definitions()); err != nil {
		return lv.Domain{}, err
	}
	return call(ctx, l, func(l *link) (lv.Domain, error) { return l.DomainDefineXML(text) })
}

// definitions is the folder of libvirt's definitions.
func (d *Driver) definitions() string { return filepath.Join(filepath.Dir(d.cfg.QEMUConf), "qemu") }

// roomToDefine says why libvirt could not write a definition in a folder, which it
// makes if need be. Whether it may write there at all this process cannot tell: it
// may see the file system read-only, when libvirt does not.
func roomToDefine(dir string) error {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	if errors.Is(err, fs.ErrNotExist) {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &st)
	}
	switch {
	case err != nil:
		return fmt.Errorf("where libvirt keeps definitions: %s: %w", dir, err)
	case int64(st.Bavail)*st.Bsize < definitionRoom || st.Files > 0 && st.Ffree == 0:
		return fmt.Errorf("%s, where libvirt keeps definitions, is full: %w", dir, unix.ENOSPC)
	}
	return nil
}

// examineDefinitions asks whether a domain can be defined here once it has come.
func (d *Driver) examineDefinitions(o *offer, c *hypervisor.Checks) {
	if o.Persistent == "" {
		return
	}
	if err := roomToDefine(d.definitions()); err != nil {
		c.Fail("definition", err.Error(), "make room there: the guest is to be defined on this host")
	} else {
		c.Pass("definition", "%s has room for it", d.definitions())
	}
}

// errForgotten says that libvirt knows a domain no more whose QEMU runs.
var errForgotten = errors.New(forgottenWord)

const forgottenWord = "libvirt has forgotten it, and its QEMU runs on: restart libvirtd, which finds it again"

// notForgotten is errForgotten of a domain that libvirt does not know, or knows
// only as one that does not run, and whose QEMU runs. One without a UUID is new.
func (d *Driver) notForgotten(ctx context.Context, l *link, name, id string) error {
	if id == "" {
		return nil
	}
	p, err := d.findProcess(name, id)
	if err != nil {
		return noneIsFine(err)
	}
	defer func() { _ = p.close() }() // it was only looked at
	active, err := call(ctx, l, func(l *link) (int32, error) {
		return l.DomainIsActive(lv.Domain{Name: name, UUID: lv.UUID(uuid.MustParse(id)), ID: -1})
	})
	if err == nil && active == 0 || isCode(err, lv.ErrNoDomain) {
		return errForgotten
	}
	return err
}

// lives says whether the domain's QEMU does, which libvirt may not know.
func (g *domain) lives() bool {
	g.mu.Lock()
	proc := g.proc
	g.mu.Unlock()
	return proc != nil && !proc.dead()
}

// forgotten is for a domain that libvirt knows no more, or only as one that does not
// run, and whose QEMU runs: it stays among the others, as one that cannot be
// reached. The looking is held.
func (g *domain) forgotten() error {
	g.mu.Lock()
	old, word := g.proc, forgottenWord
	if g.owed != "" {
		word += "; see to this before, or it will forget it again: " + g.owed
	}
	known := g.lost && g.runstate == word
	g.mu.Unlock()
	proc, err := g.processNow(old, true)
	if err != nil {
		return err
	}
	if !known {
		g.d.log.Error("look at a domain", "guest", g.name, "error", word)
	}
	g.tell(func() { g.state, g.proc, g.lost, g.runstate = hypervisor.StateRunning, proc, true, word })
	g.lookAgain()
	if old != proc {
		return old.close()
	}
	return nil
}

// forgottenTillNow says whether a domain was forgotten by libvirt and has ended only
// just now. Libvirt still follows the QEMU of one that it has forgotten: what was
// defined at that moment, it would take for that one and remove.
func (g *domain) forgottenTillNow() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.lost || g.proc == nil || !strings.HasPrefix(g.runstate, forgottenWord) {
		return false
	}
	select {
	case <-g.proc.ended:
		return time.Since(g.proc.endedAt) < exitGrace
	default:
		return true
	}
}

// recall makes domains that libvirt has forgotten, by what an earlier agent wrote of
// them when they had just come: a look at them finds the rest.
func (d *Driver) recall() error {
	entries, err := os.ReadDir(d.travels())
	if err != nil {
		return fmt.Errorf("libvirt: %w", err)
	}
	known := make(map[string]bool) // by UUID and by name
	for _, g := range d.all() {
		known[g.uuid], known[g.name] = true, true
	}
	var errs []error
	for _, e := range entries {
		if !known[e.Name()] {
			errs = append(errs, d.recallOne(e.Name(), known))
		}
	}
	return errors.Join(errs...)
}

func (d *Driver) recallOne(id string, known map[string]bool) error {
	parsed, err := uuid.Parse(id)
	var r shellRecord
	f := d.filesOf(id)
	if err != nil || !there(f.resumed()) || read(f.shell(), &r) != nil || r.UUID != id || known[r.Name] {
		return nil // nobody can go on with that
	}
	p, err := d.findProcess(r.Name, id)
	if err != nil {
		return noneIsFine(err)
	}
	g := d.of(lv.Domain{Name: r.Name, UUID: lv.UUID(parsed)})
	g.tell(func() {
		g.state, g.proc, g.incoming = hypervisor.StateRunning, p, false
		if r.isOf(p, hypervisor.StateRunning) { // else it is another hand's
			g.arriving, g.brought = &r, r.Cards
		}
	})
	return nil
}

// noneIsFine is the error of findProcess, unless it says that there is no process.
func noneIsFine(err error) error {
	if errors.Is(err, errNoProcess) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
