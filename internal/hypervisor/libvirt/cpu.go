package libvirt

import (
	"context"
	"errors"
	"fmt"

	lv "github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
)

// hypervisorCPU is the XML of the best CPU that this host's QEMU gives to
// domains like this one, as libvirt's host-model; empty if libvirt does not know.
func hypervisorCPU(ctx context.Context, l *link, x *libvirtxml.Domain) (string, error) {
	caps, err := domainCapabilities(ctx, l, x)
	if err != nil || caps.CPU == nil {
		return "", err
	}
	for _, m := range caps.CPU.Modes {
		if m.Name != "host-model" || m.Supported != "yes" || len(m.Models) == 0 {
			continue
		}
		cpu := libvirtxml.DomainCPU{Mode: "custom", Match: "exact", Model: &libvirtxml.DomainCPUModel{Value: m.Models[0].Name}, Vendor: m.Vendor}
		for _, f := range m.Features {
			cpu.Features = append(cpu.Features, libvirtxml.DomainCPUFeature(f))
		}
		return cpu.Marshal()
	}
	return "", nil
}

// compareCPU has libvirt say whether this host's QEMU provides a CPU to domains
// like this one.
func compareCPU(ctx context.Context, l *link, x *libvirtxml.Domain, cpu string, flags lv.ConnectCompareCPUFlags) (lv.CPUCompareResult, error) {
	emulator, arch, machine := platform(x)
	r, err := call(ctx, l, func(l *link) (int32, error) {
		return l.ConnectCompareHypervisorCPU(optional(emulator), optional(arch), optional(machine), optional(x.Type), cpu, uint32(flags))
	})
	return lv.CPUCompareResult(r), err
}

// lacking is what of a CPU this host's QEMU does not provide, in libvirt's words.
// Libvirt has them for an error only, which is in its log too: they are asked
// for when they are needed.
func lacking(ctx context.Context, l *link, x *libvirtxml.Domain, cpu string) (string, error) {
	_, err := compareCPU(ctx, l, x, cpu, lv.ConnectCompareCPUFailIncompatible)
	var refused lv.Error
	switch {
	case isCode(err, lv.ErrCPUIncompatible) && errors.As(err, &refused):
		return refused.Message, nil
	case err != nil:
		return "", err
	}
	return "libvirt calls it incompatible", nil
}

// examineCPU asks whether the guest finds its CPU here. Where QEMU does not
// provide all of a model on either host, as libvirt allows, the guest has what
// the source's could give, and finds that here if this host's can give as much.
func examineCPU(ctx context.Context, l *link, o *offer, x *libvirtxml.Domain, c *hypervisor.Checks) error {
	wanted, err := namedCPU(x)
	if err != nil {
		return err
	}
	if wanted != "" {
		switch result, err := compareCPU(ctx, l, x, wanted, 0); {
		case err != nil:
			return noComparison(c, err)
		case result == lv.CPUCompareIdentical || result == lv.CPUCompareSuperset:
			c.Pass("CPU", "this host provides all of %s", x.CPU.Model.Value)
			return nil
		}
	}
	result, missing := lv.CPUCompareError, ""
	if o.CPU != "" {
		if result, err = compareCPU(ctx, l, x, o.CPU, 0); err != nil {
			return noComparison(c, err)
		}
	}
	if result == lv.CPUCompareIncompatible || result == lv.CPUCompareError && wanted != "" {
		which := o.CPU
		if wanted != "" {
			which = wanted
		}
		if missing, err = lacking(ctx, l, x, which); err != nil {
			return noComparison(c, err)
		}
	}
	judgeCPU(x.CPU, wanted != "", result, missing, c)
	return nil
}

// namedCPU is the XML of a domain's CPU if it has a model, empty if it has that
// of its host.
func namedCPU(x *libvirtxml.Domain) (string, error) {
	if x.CPU == nil || x.CPU.Model == nil || x.CPU.Mode == "host-passthrough" || x.CPU.Mode == "maximum" {
		return "", nil
	}
	cpu := *x.CPU
	cpu.Topology, cpu.Cache, cpu.Numa = nil, nil, nil
	text, err := cpu.Marshal()
	if err != nil {
		return "", fmt.Errorf("the guest's CPU: %w", err)
	}
	return text, nil
}

// noComparison says that libvirt could not compare; an error that is not its
// answer is handed on.
func noComparison(c *hypervisor.Checks, err error) error {
	var answer lv.Error
	if !errors.As(err, &answer) || errors.Is(err, errDisconnected) {
		return err
	}
	c.Warn("CPU", "libvirt cannot compare it: "+answer.Message, "see that this host's CPU has the features that the guest uses")
	return nil
}

// judgeCPU weighs what the comparison with the source's CPU has come to, of a
// guest whose own CPU is not one that this host provides all of; missing says
// what of it, or of the source's.
func judgeCPU(cpu *libvirtxml.DomainCPU, named bool, result lv.CPUCompareResult, missing string, c *hypervisor.Checks) {
	const advice = "start the guest with a CPU model that both hosts have"
	model := "the default"
	switch {
	case named:
		model = cpu.Model.Value
	case cpu != nil && cpu.Mode != "":
		model = cpu.Mode
	}
	switch {
	case result == lv.CPUCompareIdentical:
		c.Pass("CPU", "%s; both hosts provide the same CPU", model)
	case result == lv.CPUCompareSuperset && named:
		c.Pass("CPU", "%s; this host provides all that the source does", model)
	case result == lv.CPUCompareSuperset:
		c.Warn("CPU", fmt.Sprintf("%s; this host's CPU has more than the source's, which the guest would have from its next start on", model), advice+", or it may not be able to return")
	case result == lv.CPUCompareError && !named:
		c.Warn("CPU", fmt.Sprintf("%s; libvirt does not say what CPU the source provides", model), "see that both hosts have the same CPU")
	case named && cpu.Check == "none":
		c.Warn("CPU", fmt.Sprintf("%s, which the domain says is not to be checked (check='none'): %s", model, missing), advice)
	default:
		c.Fail("CPU", fmt.Sprintf("%s: %s", model, missing), advice)
	}
}
