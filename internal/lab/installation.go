package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Installation is a libvirt that a host uses instead of the machine's: unpacked
// somewhere, of another version.
type Installation struct {
	Libvirtd string `json:"libvirtd,omitempty"` // path of the daemon, or of a script that runs it
	Virtlogd string `json:"virtlogd,omitempty"`
	// Layers are folders that are laid over the host's /usr, the first on top: of
	// what several have, it sees the topmost. Binds come on top of them.
	Layers []string `json:"layers,omitempty"`
	// Binds are paths that are to be seen on the host, and what is to be seen
	// there: files over files, folders over folders.
	Binds map[string]string `json:"binds,omitempty"`
}

// usr is where layers are laid over.
const usr = "/usr"

// ownFolders are those below /usr whose programs load what they find there, and
// choke on what belongs to another version: the topmost layer that has one has it
// alone.
var ownFolders = []string{"lib/*/libvirt", "lib/*/qemu"}

// Unpacked is the installation that folders like /usr hold, the first on top,
// together with the machine's own: its programs, libraries and data are at their
// places on the host, and find each other there.
func Unpacked(layers ...string) (Installation, error) {
	in := Installation{Libvirtd: "/usr/sbin/libvirtd", Virtlogd: "/usr/sbin/virtlogd", Layers: layers, Binds: make(map[string]string)}
	for _, pattern := range ownFolders {
		for _, layer := range layers {
			found, err := filepath.Glob(filepath.Join(layer, pattern))
			if err != nil {
				return Installation{}, fmt.Errorf("lab: %w", err)
			}
			for _, folder := range found {
				at := usr + strings.TrimPrefix(folder, filepath.Clean(layer))
				if _, taken := in.Binds[at]; !taken {
					in.Binds[at] = folder
				}
			}
		}
	}
	return in, nil
}

// check is about an installation that cannot be had.
func (in Installation) check(host string) error {
	for at, what := range in.Binds {
		if !filepath.IsAbs(at) || !filepath.IsAbs(what) {
			return fmt.Errorf("lab: %s: bind %s to %s: both must be absolute paths", host, what, at)
		}
	}
	for _, layer := range in.Layers {
		// What separates layers, and mount options, in those of overlayfs.
		if !filepath.IsAbs(layer) || strings.ContainsAny(layer, `:,\`) {
			return fmt.Errorf("lab: %s: layer %q: it must be an absolute path without colon, comma and backslash", host, layer)
		}
		if info, err := os.Stat(layer); err != nil {
			return fmt.Errorf("lab: %s: layer: %w", host, err)
		} else if !info.IsDir() {
			return fmt.Errorf("lab: %s: layer %s is no folder", host, layer)
		}
	}
	return nil
}

// layOver mounts layers over /usr in this thread's mount namespace. Nothing can
// be written there.
func (in Installation) layOver() error {
	if len(in.Layers) == 0 {
		return nil
	}
	options := "lowerdir=" + strings.Join(in.Layers, ":") + ":" + usr
	if err := unix.Mount("lmctl-lab", usr, "overlay", unix.MS_RDONLY|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", options, usr, err)
	}
	return nil
}
