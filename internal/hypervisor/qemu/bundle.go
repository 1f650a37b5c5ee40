package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/internal/hypervisor/storage"
)

// bundleVersion is that of the format below.
const bundleVersion = 2

// maxBundle bounds what is read from another host, in bytes.
const maxBundle = 1 << 20

// bundle is what the destination gets to know of a guest: how it was started,
// and what the source sees, to be compared.
type bundle struct {
	Version     int                   `json:"version"`
	Definition  string                `json:"definition"` // YAML
	Machine     string                `json:"machine"`    // versioned
	Accelerator Accelerator           `json:"accelerator"`
	CPU         string                `json:"cpu"`  // as given to QEMU
	QEMU        string                `json:"qemu"` // version
	Guest       cpuFacts              `json:"guest_cpu"`
	PageSize    int                   `json:"page_size"`
	Files       []storage.Facts       `json:"files"`
	Cards       map[string]nics.Facts `json:"cards"` // by MAC, learnt addresses too
}

// Definition describes the guest to the destination.
func (g *Guest) Definition(ctx context.Context) ([]byte, error) {
	b, err := g.v.bundle(ctx, g.v.monitor(g.inst))
	if err != nil {
		return nil, fmt.Errorf("describe guest %s: %w", g.Name(), err)
	}
	return json.Marshal(b)
}

func (v *vm) bundle(ctx context.Context, mon *monitor) (*bundle, error) {
	v.mu.Lock()
	run := v.rec.Run
	v.mu.Unlock()
	if run == nil {
		return nil, errors.New("nothing is recorded of how it was started")
	}
	text, err := v.def.YAML()
	if err != nil {
		return nil, err
	}
	cpu, err := queryCPU(ctx, mon)
	if err != nil {
		return nil, err
	}
	facts, err := storage.All(gatherFiles(v.def))
	if err != nil {
		return nil, err
	}
	described, err := v.cards()
	if err != nil {
		return nil, err
	}
	return &bundle{
		Version: bundleVersion, Definition: string(text),
		Machine: run.Machine, Accelerator: run.Accelerator, CPU: run.CPU, QEMU: mon.version.String(),
		Guest: *cpu, PageSize: pageSize, Files: facts, Cards: nics.FactsOf(described),
	}, nil
}

var versionText = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}$`)

// parseBundle reads what another host says of a guest. Nothing in it is
// trusted to be right, nor to be a file that we should read.
func parseBundle(data []byte) (*bundle, *Definition, error) {
	if of, ok := hypervisor.OfferedBy(data, maxBundle); ok && of != "" {
		return nil, nil, fmt.Errorf("it is a guest of %q; set hypervisor to the same on both hosts", of)
	}
	var b bundle
	if err := hypervisor.DecodeVersion(data, maxBundle, bundleVersion, &b); err != nil {
		return nil, nil, err
	}
	def, err := ParseDefinition([]byte(b.Definition))
	if err != nil {
		return nil, nil, err
	}
	if err := b.check(def); err != nil {
		return nil, nil, err
	}
	return &b, def, nil
}

func (b *bundle) check(def *Definition) error {
	switch {
	case !machinePattern.MatchString(b.Machine):
		return fmt.Errorf("machine type %q", b.Machine)
	case b.Accelerator != AcceleratorKVM && b.Accelerator != AcceleratorTCG:
		return fmt.Errorf("accelerator %q", b.Accelerator)
	case !cpuPattern.MatchString(b.CPU):
		return fmt.Errorf("CPU model %q", b.CPU)
	case !versionText.MatchString(b.QEMU):
		return fmt.Errorf("QEMU version %q", b.QEMU)
	case len(b.Guest.Words) > 1024:
		return fmt.Errorf("%d words of CPUID", len(b.Guest.Words))
	}
	return nics.Check(b.Cards, func(mac string) bool {
		return slices.ContainsFunc(def.NICs, func(n NIC) bool { return n.MAC == mac })
	})
}
