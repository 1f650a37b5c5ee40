package lab

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lmctl/lmctl/guest/linux"
)

// A libvirtd that has never seen a QEMU tries it out, for seconds, before it
// takes the first domain. What it finds it writes into its cache, with all that
// it depends on, and checks that before it believes it. So what a lab's libvirtd
// has found is kept beside the kernels of Linux guests, and given to the next
// one's.

// capabilitiesDir is where libvirt keeps them on a host, seen from outside.
func (l *Lab) capabilitiesDir(host string) string {
	return filepath.Join(l.libvirtDir(host), "cache", "qemu", "capabilities")
}

// capabilitiesStore is where those for hosts like this one are kept: another
// libvirt, or another user, would find what is kept of no use, and replace it.
func (l *Lab) capabilitiesStore(host string) (string, error) {
	cache, err := linux.CacheDir()
	if err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	o := l.state.Libvirt
	in := o.Installations[host]
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", []any{o.User, o.Group, in.Libvirtd, in.Layers, in.Binds}))
	return filepath.Join(cache, "libvirt-capabilities", hex.EncodeToString(sum[:8])), nil
}

// seedCapabilities gives a new host what is kept.
func (l *Lab) seedCapabilities(host string) error {
	store, err := l.capabilitiesStore(host)
	if err != nil {
		return err
	}
	return copyNew(l.capabilitiesDir(host), store)
}

// keepCapabilities keeps what the hosts have found.
func (l *Lab) keepCapabilities() error {
	if l.Hypervisor() != Libvirt {
		return nil
	}
	var errs []error
	for _, host := range l.Hosts() {
		store, err := l.capabilitiesStore(host)
		if err == nil {
			err = copyNew(store, l.capabilitiesDir(host))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// copyNew copies the files of a folder, if there is one, that another folder has
// not or has otherwise.
func copyNew(to, from string) error {
	files, err := filepath.Glob(filepath.Join(from, "*.xml"))
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("lab: %w", err)
		}
		at := filepath.Join(to, filepath.Base(file))
		if has, err := os.ReadFile(at); err == nil && bytes.Equal(has, b) {
			continue
		}
		if err := os.MkdirAll(to, 0o755); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
		if err := replace(at, b); err != nil {
			return fmt.Errorf("lab: %w", err)
		}
	}
	return nil
}

// replace makes a file that is never seen half-written, while others may do the
// same.
func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
