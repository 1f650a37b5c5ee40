package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/lab/domain"
)

// maxDomainName is the length that libvirt leaves whole in the names of a
// domain's folders: VIR_DOMAIN_SHORT_NAME_MAX.
const maxDomainName = 20

// completeDomain is complete for what only libvirt's guests have.
func (l *Lab) completeDomain(s *GuestSpec) error {
	if l.Hypervisor() != Libvirt {
		if s.Shape != (domain.Shape{}) {
			return fmt.Errorf("lab: guest %s: shapes are for labs with libvirt", s.Name)
		}
		return nil
	}
	if s.Shape.Machine == "" {
		s.Shape.Machine = s.Machine
	}
	s.Machine = s.Shape.Machine
	switch {
	case len(s.Name) > maxDomainName:
		return fmt.Errorf("lab: guest %s: libvirt shortens names of more than %d characters", s.Name, maxDomainName)
	case s.FirmwareDir != "":
		return fmt.Errorf("lab: guest %s: libvirt knows no firmware folder: name a QEMU that finds its own", s.Name)
	}
	return nil
}

// defineDomain makes a guest's disk and its definition for libvirt.
func (l *Lab) defineDomain(ctx context.Context, g *Guest, boot linux.Boot) ([]byte, error) {
	d := domain.Guest{
		Name: g.Name, UUID: g.UUID, Emulator: g.QEMU, Memory: g.Memory, VCPUs: g.VCPUs,
		Disk: l.onHosts(l.diskOf(*g)), Console: domain.Console(g.Name),
	}
	var err error
	if d.KVM, err = useKVM(g.GuestSpec); err != nil {
		return nil, err
	}
	if g.Kind == Linux {
		if boot, err = l.ownBoot(boot); err != nil {
			return nil, err
		}
		d.Kernel, d.Initrd = boot.Kernel, boot.Initrd
		d.Cmdline = linux.Console + " " + g.settings().Cmdline()
		d.Bridge, d.MAC = Bridge, g.MAC
	}
	if g.Disk == "" {
		if err := l.makeDisk(ctx, *g); err != nil {
			return nil, err
		}
	}
	text, err := g.Shape.XML(d)
	return []byte(text), err
}

// onHosts is the path by which hosts with libvirt call a file of the storage.
func (l *Lab) onHosts(path string) string {
	if rest, ok := strings.CutPrefix(path, l.Storage()+"/"); ok && l.Hypervisor() == Libvirt {
		return filepath.Join(Images, rest)
	}
	return path
}

// useKVM chooses a domain's type as the agent does for QEMU: a flat guest is
// for KVM, a Linux guest for a CPU that virtualizes.
func useKVM(s GuestSpec) (bool, error) {
	openable := unix.Access(kvmDevice, unix.R_OK|unix.W_OK) == nil
	switch s.Accelerator {
	case "kvm":
		return true, nil
	case "tcg":
		return false, nil
	case "", "auto":
	default:
		return false, fmt.Errorf("lab: guest %s: no such accelerator: %q", s.Name, s.Accelerator)
	}
	if s.Kind == Flat && s.Accelerator == "" {
		return openable, nil
	}
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false, fmt.Errorf("lab: %w", err)
	}
	virtualizes := bytes.Contains(b, []byte(" vmx ")) || bytes.Contains(b, []byte(" svm "))
	return openable && virtualizes, nil
}

// ownBoot copies what Linux guests boot from into the lab, if libvirt would
// change the owner of a file that others use.
func (l *Lab) ownBoot(boot linux.Boot) (linux.Boot, error) {
	if !l.state.Libvirt.DynamicOwnership {
		return boot, nil
	}
	own := linux.Boot{}
	for from, to := range map[string]*string{boot.Kernel: &own.Kernel, boot.Initrd: &own.Initrd} {
		at := filepath.Join(l.Storage(), filepath.Base(from))
		if err := copyOnce(from, at); err != nil {
			return own, err
		}
		*to = l.onHosts(at)
	}
	return own, nil
}

// copyOnce copies a file for everybody to read, unless it has been. Others may do
// so at the same time.
func copyOnce(from, to string) error {
	if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(to), filepath.Base(to)+".*")
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("lab: %w", err), os.Remove(f.Name()))
	}
	// A link is refused where another has been faster, whose copy may be in use.
	if err := os.Link(f.Name(), to); err != nil && !errors.Is(err, os.ErrExist) {
		return errors.Join(fmt.Errorf("lab: %w", err), os.Remove(f.Name()))
	}
	if err := os.Remove(f.Name()); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// forQEMU gives a file to the user that QEMU runs as, if libvirt does not.
func (l *Lab) forQEMU(path string) error {
	o := l.state.Libvirt
	if o == nil || o.DynamicOwnership || o.User == "root" {
		return nil
	}
	u, err := user.Lookup(o.User)
	if err != nil {
		return fmt.Errorf("lab: QEMU's user: %w", err)
	}
	g, err := user.LookupGroup(o.Group)
	if err != nil {
		return fmt.Errorf("lab: QEMU's group: %w", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return fmt.Errorf("lab: user %s: %w", u.Username, err)
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return fmt.Errorf("lab: group %s: %w", g.Name, err)
	}
	if err := os.Chown(path, uid, gid); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// toQcow2 turns a raw image into a qcow2 image in its place.
func toQcow2(ctx context.Context, path string) error {
	made := path + ".qcow2"
	out, err := exec.CommandContext(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, made).CombinedOutput()
	if err != nil {
		return fmt.Errorf("lab: qemu-img convert %s: %w: %s", path, err, bytes.TrimSpace(out))
	}
	if err := os.Rename(made, path); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// startDomain starts a guest by libvirt itself: where no agent runs, and for
// transient domains, which an agent only finds.
func (l *Lab) startDomain(ctx context.Context, g Guest, definition string) error {
	return l.WithLibvirt(ctx, g.Host, func(v *libvirt.Libvirt) error {
		if g.Shape.Transient {
			_, err := v.DomainCreateXML(definition, 0)
			return err
		}
		d, err := v.DomainDefineXML(definition)
		if err != nil {
			return err
		}
		return v.DomainCreate(d)
	})
}

// removeDomain ends a guest by libvirt itself, and removes its definition.
func (l *Lab) removeDomain(ctx context.Context, host, name string) error {
	runs, err := l.DaemonRuns(host, Libvirtd)
	if err != nil || !runs {
		return err
	}
	return l.WithLibvirt(ctx, host, func(v *libvirt.Libvirt) error {
		d, err := v.DomainLookupByName(name)
		if libvirt.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		persistent, err := v.DomainIsPersistent(d)
		if err != nil {
			return err
		}
		if state, _, err := v.DomainGetState(d, 0); err != nil {
			return err
		} else if libvirt.DomainState(state) != libvirt.DomainShutoff {
			if err := v.DomainDestroy(d); err != nil {
				return err
			}
		}
		if persistent == 0 {
			return nil
		}
		return v.DomainUndefineFlags(d, libvirt.DomainUndefineNvram|libvirt.DomainUndefineManagedSave|libvirt.DomainUndefineSnapshotsMetadata)
	})
}

// domainStates are the states of a host's guests as its libvirt says, in an
// agent's words.
func (l *Lab) domainStates(ctx context.Context, host string) (map[string]string, error) {
	states := make(map[string]string)
	err := l.WithLibvirt(ctx, host, func(v *libvirt.Libvirt) error {
		domains, _, err := v.ConnectListAllDomains(1, 0)
		if err != nil {
			return err
		}
		for _, d := range domains {
			state, _, err := v.DomainGetState(d, 0)
			if libvirt.IsNotFound(err) {
				continue // gone meanwhile
			}
			if err != nil {
				return err
			}
			switch libvirt.DomainState(state) {
			case libvirt.DomainRunning, libvirt.DomainBlocked:
				states[d.Name] = "running"
			case libvirt.DomainShutoff, libvirt.DomainCrashed:
				states[d.Name] = "stopped"
			default:
				states[d.Name] = "paused"
			}
		}
		return nil
	})
	return states, err
}

// WithLibvirt runs f with a connection to a host's libvirt.
func (l *Lab) WithLibvirt(ctx context.Context, host string, f func(*libvirt.Libvirt) error) error {
	v, err := l.ConnectLibvirt(ctx, host)
	if err != nil {
		return err
	}
	if err := errors.Join(f(v), v.Disconnect()); err != nil {
		return fmt.Errorf("lab: libvirt of %s: %w", host, err)
	}
	return nil
}
