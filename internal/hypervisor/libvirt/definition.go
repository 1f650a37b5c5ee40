package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	lv "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// definitionRoom is how many bytes are to be free where libvirt writes a
// definition: many times what one takes, so that somebody else who writes at the
// same time does not take it all.
const definitionRoom = 1 << 20

// defineXML has libvirt define a domain. That must not fail for want of room while
// the domain runs: libvirt, which cannot write the definition of a domain that had
// none, then forgets the domain, while its QEMU goes on (seen with 9.0 and a full
// disk). So it is not asked where there is next to none.
func (d *Driver) defineXML(ctx context.Context, l *link, text string) (lv.Domain, error) {
	if err := roomToDefine(d.definitions()); err != nil {
		return lv.Domain{}, err
	}
	return call(ctx, l, func(l *link) (lv.Domain, error) { return l.DomainDefineXML(text) })
}

// definitions is the folder of libvirt's definitions.
func (d *Driver) definitions() string { return filepath.Join(filepath.Dir(d.cfg.QEMUConf), "qemu") }

// roomToDefine says why libvirt could not write a definition in a folder, which it
// makes if need be.
func roomToDefine(dir string) error {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	if errors.Is(err, fs.ErrNotExist) {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &st)
	}
	free := int64(st.Bavail) * st.Bsize
	switch {
	case err != nil:
		return fmt.Errorf("where libvirt keeps definitions: %s: %w", dir, err)
	case st.Flags&unix.ST_RDONLY != 0:
		return fmt.Errorf("%s, where libvirt keeps definitions: %w", dir, unix.EROFS)
	case free < definitionRoom || st.Files > 0 && st.Ffree == 0:
		return fmt.Errorf("%s, where libvirt keeps definitions, has %d bytes and %d files free: %w", dir, free, st.Ffree, unix.ENOSPC)
	}
	return nil
}

// examineDefinitions asks whether a domain can be defined here once it has come.
func (d *Driver) examineDefinitions(o *offer, c *hypervisor.Checks) {
	if o.Persistent == "" {
		return
	}
	if err := roomToDefine(d.definitions()); err != nil {
		c.Fail("definition", err.Error(), "let libvirt write there: the guest is to be defined on this host")
	} else {
		c.Pass("definition", "%s has room for it", d.definitions())
	}
}

// errForgotten says that libvirt knows a domain no more whose QEMU runs. To define
// it would make another one of it, which could be started beside.
var errForgotten = errors.New(forgottenWord)

const forgottenWord = "libvirt has forgotten it, and its QEMU runs on: restart libvirtd, which finds it again"

// lives says whether the domain's QEMU does, which libvirt may not know.
func (g *domain) lives() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.proc != nil && !g.proc.dead()
}

// notForgotten is errForgotten, or nil.
func (g *domain) notForgotten(ctx context.Context, l *link) error {
	_, err := call(ctx, l, func(l *link) (lv.Domain, error) { return l.DomainLookupByUUID(g.ref().UUID) })
	switch {
	case !isCode(err, lv.ErrNoDomain):
		return err
	case g.lives():
		return errForgotten
	}
	return nil
}

// forgotten is for a domain that libvirt knows no more, and whose QEMU runs: it
// stays among the others, as one that cannot be reached.
func (g *domain) forgotten() error {
	g.mu.Lock()
	known := g.lost && g.runstate == forgottenWord
	g.mu.Unlock()
	if !known {
		g.d.log.Error("look at a domain", "guest", g.name, "error", errForgotten)
		g.tell(func() { g.lost, g.runstate = true, forgottenWord })
	}
	g.lookAgain()
	return nil
}
