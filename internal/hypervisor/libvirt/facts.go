package libvirt

import (
	"fmt"
	"net"
	"slices"

	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/migrate/announce"
)

// facts are what a domain's XML says.
type facts struct {
	memory      int64 // bytes, at the most
	vcpus       int
	machine     string
	accelerator string
	cpu         string
	bridges     []string
	cards       []announce.NIC // of a running domain
	console     string         // path of a terminal or socket
	xml         *libvirtxml.Domain
	// offered says that this is by the source's XML: libvirt here has not been
	// asked, and the cards are not known.
	offered bool
}

// parseFacts reads a domain's XML.
func parseFacts(text string) (facts, error) {
	var x libvirtxml.Domain
	if err := x.Unmarshal(text); err != nil {
		return facts{}, fmt.Errorf("libvirt: domain XML: %w", err)
	}
	f := facts{xml: &x, accelerator: accelerator(x.Type), vcpus: 1}
	if m := x.Memory; m != nil {
		size, err := bytesOf(m.Value, m.Unit)
		if err != nil {
			return facts{}, err
		}
		f.memory = size
	}
	if x.VCPU != nil {
		f.vcpus = int(x.VCPU.Value)
	}
	if x.OS != nil && x.OS.Type != nil {
		f.machine = x.OS.Type.Machine
	}
	if x.CPU != nil {
		f.cpu = x.CPU.Mode
		if x.CPU.Model != nil && x.CPU.Model.Value != "" {
			f.cpu = x.CPU.Model.Value
		}
	}
	if x.Devices == nil {
		return f, nil
	}
	for _, c := range x.Devices.Serials {
		if c.Source != nil && c.Source.Pty != nil {
			f.console = c.Source.Pty.Path
		}
	}
	for i := range x.Devices.Interfaces {
		if err := f.addCard(&x.Devices.Interfaces[i]); err != nil {
			return facts{}, err
		}
	}
	return f, nil
}

// addCard notes a card and the bridge that it is on.
func (f *facts) addCard(i *libvirtxml.DomainInterface) error {
	bridge := ""
	switch {
	case i.Source == nil:
	case i.Source.Bridge != nil:
		bridge = i.Source.Bridge.Bridge
	case i.Source.Network != nil:
		bridge = i.Source.Network.Bridge // of a running domain
	}
	if bridge != "" && !slices.Contains(f.bridges, bridge) {
		f.bridges = append(f.bridges, bridge)
	}
	if bridge == "" || i.MAC == nil || i.Target == nil || i.Target.Dev == "" {
		return nil
	}
	mac, err := net.ParseMAC(i.MAC.Address)
	if err != nil {
		return fmt.Errorf("libvirt: domain XML: card %s: %w", i.MAC.Address, err)
	}
	f.cards = append(f.cards, announce.NIC{Bridge: bridge, Tap: i.Target.Dev, MAC: mac, Addresses: slices.Clip(filterAddresses(i))})
	return nil
}

// accelerator is what runs a domain of a type.
func accelerator(kind string) string {
	if kind == "qemu" {
		return "tcg"
	}
	return kind
}

// units are libvirt's for memory.
var units = map[string]int64{
	"b": 1, "bytes": 1, "": 1 << 10,
	"KB": 1000, "k": 1 << 10, "KiB": 1 << 10, "MB": 1000 * 1000, "M": 1 << 20, "MiB": 1 << 20,
	"GB": 1000 * 1000 * 1000, "G": 1 << 30, "GiB": 1 << 30, "TB": 1e12, "T": 1 << 40, "TiB": 1 << 40,
}

func bytesOf(value uint, unit string) (int64, error) {
	size, ok := units[unit]
	if !ok || int64(value) > 1<<52/size {
		return 0, fmt.Errorf("libvirt: domain XML: memory of %d %q", value, unit)
	}
	return int64(value) * size, nil
}
