package libvirt

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor/nics"
)

// suspensionRecord is on disk from before a domain is suspended until it runs
// again or is released.
type suspensionRecord struct {
	Name string `json:"name"`
	UUID string `json:"uuid"`
	// IgnoredShared is what the capability was before.
	IgnoredShared bool `json:"ignored_shared"`
	// Relayed says that the capability was not touched.
	Relayed bool `json:"relayed,omitempty"`
	// MaxDowntime is QEMU's limit before, in milliseconds; 0 if it is not touched.
	MaxDowntime uint64 `json:"max_downtime,omitempty"`
}

// shellRecord is on disk while a domain is on its way here.
type shellRecord struct {
	Name string `json:"name"`
	UUID string `json:"uuid"`
	// Persistent is the XML by which it is to be defined here, empty if it is to
	// stay transient.
	Persistent string                `json:"persistent,omitempty"`
	Autostart  bool                  `json:"autostart,omitempty"`
	Cards      map[string]nics.Facts `json:"cards,omitempty"`
	// PID and Start are of the shell's QEMU, 0 as long as that is being made:
	// another one of the same domain is another hand's.
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"`
}

// write replaces a file, for an agent that dies now to leave for the next. It
// need not outlive the host, as no process does.
func write(path string, content any) error {
	text, err := json.Marshal(content)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := passable(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.WriteFile(path+unfinished, text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+unfinished, path)
}

// unfinished ends the name of a file that is being written.
const unfinished = ".new"

// passable makes a folder through which another user reaches a folder of its
// own, whatever our umask.
func passable(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	return os.Chmod(dir, 0o711)
}

func read(path string, content any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, content); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// there says whether a file is there, or may be.
func there(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// tidy removes the folder if nothing is in it any more.
func (f files) tidy() error {
	err := os.Remove(f.dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return err
}

// endSuspension removes what there is of a suspension.
func (f files) endSuspension() error {
	return errors.Join(os.RemoveAll(f.stream()), removeFile(f.suspension()), f.tidy())
}

// remove removes all files of a domain. What says that it was told to run goes
// last: without that, it would be taken for a shell that another hand has run.
func (f files) remove() error {
	return errors.Join(removeFile(f.shell()), os.RemoveAll(f.dir))
}

// sweep takes up what an earlier agent left of its migrations, and removes what
// belongs to no domain any more.
func (d *Driver) sweep() error {
	parent := d.travels()
	entries, err := os.ReadDir(parent)
	if err != nil {
		return fmt.Errorf("libvirt: %w", err)
	}
	byID := make(map[string]*domain)
	for _, g := range d.all() {
		byID[g.uuid] = g
	}
	var errs []error
	for _, e := range entries {
		g := byID[e.Name()]
		if g == nil {
			errs = append(errs, os.RemoveAll(filepath.Join(parent, e.Name())))
			continue
		}
		errs = append(errs, g.takeUp())
	}
	return errors.Join(errs...)
}

// takeUp goes on with what an earlier agent did to a domain.
func (g *domain) takeUp() error {
	// Nobody listens on the sockets any more, and what was being written will not
	// be finished.
	err := os.RemoveAll(g.files.stream())
	for _, path := range []string{g.files.shell(), g.files.suspension(), g.files.resumed()} {
		err = errors.Join(err, removeFile(path+unfinished))
	}
	if err != nil {
		return err
	}
	var r shellRecord
	err = read(g.files.shell(), &r)
	if errors.Is(err, fs.ErrNotExist) { // it has arrived, perhaps just now
		return errors.Join(removeFile(g.files.resumed()), g.files.tidy())
	}
	if err != nil {
		return err
	}
	g.tell(func() { g.brought = r.Cards })
	return nil
}
