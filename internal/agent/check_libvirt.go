package agent

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"github.com/lmctl/lmctl/internal/api/lmctlv1"
	"github.com/lmctl/lmctl/internal/hypervisor/libvirt"
)

// minimumLibvirt and minimumLibvirtQEMU are the oldest that are tested, as
// libvirt counts versions.
const (
	minimumLibvirt     = 9_000_000
	minimumLibvirtQEMU = 7_002_000
)

// checkLibvirt says whether the host's libvirtd can be worked with, and whether
// a security module stands in the way.
func (a *Agent) checkLibvirt(ctx context.Context) []*lmctlv1.CheckLine {
	lines := []*lmctlv1.CheckLine{a.checkLibvirtd(ctx)}
	if l := checkAppArmor("/sys/module/apparmor/parameters/enabled", appArmorRules); l != nil {
		lines = append(lines, l)
	}
	if enforcing, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil && bytes.HasPrefix(enforcing, []byte("1")) {
		lines = append(lines, line("SELinux", warn, "it is enforcing, which is not tested",
			"if a migration is denied, let svirt_t connect to and create unix sockets below /run/lmctl/libvirt"))
	}
	return lines
}

func (a *Agent) checkLibvirtd(ctx context.Context) *lmctlv1.CheckLine {
	d, ok := a.driver.(interface {
		About(context.Context) (libvirt, qemu uint64, err error)
	})
	if !ok {
		return line("libvirt", fail, "this agent has no libvirt driver", "")
	}
	lib, qemu, err := d.About(ctx)
	if err != nil {
		return line("libvirt", fail, err.Error(), "start libvirtd (systemctl start libvirtd), or set libvirt.uri")
	}
	words := libvirt.VersionWords
	detail := fmt.Sprintf("libvirt %s with QEMU %s at %s", words(lib), words(qemu), a.cfg.Libvirt.URI)
	if lib < minimumLibvirt || qemu < minimumLibvirtQEMU {
		return line("libvirt", warn, detail, fmt.Sprintf("versions before libvirt %s and QEMU %s are not tested: upgrade", words(minimumLibvirt), words(minimumLibvirtQEMU)))
	}
	return line("libvirt", pass, detail, "")
}

// appArmorRules is where the package puts what libvirt's profiles lack.
const appArmorRules = "/etc/apparmor.d/abstractions/libvirt-qemu.d/lmctl"

// checkAppArmor looks for the rules where AppArmor is on; nil where it is not.
func checkAppArmor(enabled, rules string) *lmctlv1.CheckLine {
	on, err := os.ReadFile(enabled)
	if err != nil || !bytes.HasPrefix(on, []byte("Y")) {
		return nil
	}
	if _, err := os.Stat(rules); err != nil {
		return line("AppArmor", fail, "libvirt's profiles do not let QEMU use the sockets below /run/lmctl/libvirt",
			"install the package's rules as "+rules)
	}
	return line("AppArmor", pass, rules, "")
}
