package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	lv "github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/nics"
	"github.com/lmctl/lmctl/internal/hypervisor/storage"
)

// offerVersion is that of the format below.
const offerVersion = 3

// maxOffer bounds what is read from another host, in bytes.
const maxOffer = 4 << 20

// offer is what the destination gets to know of a domain.
type offer struct {
	Version    int                   `json:"version"`
	Hypervisor string                `json:"hypervisor"` // libvirt
	XML        string                `json:"xml"`        // by which libvirt makes the domain
	Cookie     []byte                `json:"cookie"`     // of Begin3
	Persistent string                `json:"persistent,omitempty"`
	Autostart  bool                  `json:"autostart,omitempty"`
	QEMU       uint64                `json:"qemu"`          // version: major × 1000000 + minor × 1000 + micro
	Libvirt    uint64                `json:"libvirt"`       // likewise
	CPU        string                `json:"cpu,omitempty"` // XML of what the source's hypervisor provides
	Security   []string              `json:"security"`      // the source's security models
	NVRAM      int64                 `json:"nvram"`         // bytes of the file with the firmware's variables, 0 without one
	PageSize   int                   `json:"page_size"`
	Files      []storage.Facts       `json:"files"`
	Cards      map[string]nics.Facts `json:"cards"` // by MAC, learnt addresses too
}

// Definition describes the domain to the destination: it has libvirt begin a
// migration, which binds it to nothing yet.
func (s *Guest) Definition(ctx context.Context) ([]byte, error) {
	l, err := s.g.d.conn.get()
	if err != nil {
		return nil, fmt.Errorf("describe guest %s: %w", s.g.name, err)
	}
	o, err := s.offer(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("describe guest %s: %w", s.g.name, err)
	}
	return json.Marshal(o)
}

func (s *Guest) offer(ctx context.Context, l *link) (*offer, error) {
	err := s.g.settleDebt(ctx)
	if err != nil {
		return nil, err
	}
	if s.like, err = s.g.likeness(ctx, l); err != nil {
		return nil, err
	}
	type begun struct {
		cookie []byte
		xml    string
	}
	b, err := call(ctx, l, func(l *link) (begun, error) {
		cookie, xml, err := l.DomainMigrateBegin3Params(s.g.ref(), nil, uint32(migrateFlags))
		return begun{cookie, xml}, err
	})
	if err != nil {
		return nil, fmt.Errorf("libvirt cannot migrate it: %w", err)
	}
	s.xml = b.xml
	o := &offer{Version: offerVersion, Hypervisor: "libvirt", XML: b.xml, Cookie: b.cookie, PageSize: os.Getpagesize(), Cards: s.g.cardFacts(ctx, l)}
	if o.Persistent, o.Autostart, err = s.g.persistence(ctx, l); err != nil {
		return nil, err
	}
	if o.QEMU, err = l.ConnectGetVersion(); err != nil {
		return nil, err
	}
	if o.Libvirt, err = l.ConnectGetLibVersion(); err != nil {
		return nil, err
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(b.xml); err != nil {
		return nil, fmt.Errorf("domain XML: %w", err)
	}
	if o.CPU, err = hypervisorCPU(ctx, l, &x); err != nil {
		return nil, err
	}
	caps, err := capabilities(ctx, l)
	if err != nil {
		return nil, err
	}
	o.Security = securityModels(caps)
	if o.NVRAM, err = sizeOfNVRAM(&x); err != nil {
		return nil, err
	}
	o.Files, err = storage.All(gatherFiles(&x))
	return o, err
}

// persistence is the definition that is to go with the domain, empty if it has
// none, and whether it starts with its host.
func (g *domain) persistence(ctx context.Context, l *link) (xml string, autostart bool, err error) {
	persistent, err := l.DomainIsPersistent(g.ref())
	if err != nil || persistent == 0 {
		return "", false, err
	}
	if xml, err = g.inactiveXML(ctx, l); err != nil {
		return "", false, err
	}
	auto, err := l.DomainGetAutostart(g.ref())
	return xml, auto != 0, err
}

// balloon is what changes in a domain's XML by itself.
var balloon = regexp.MustCompile(`<currentMemory[^>]*>[^<]*</currentMemory>`)

// likeness is the domain's XML as another libvirt would get it, by which a
// change is noticed that another hand made.
func (g *domain) likeness(ctx context.Context, l *link) (string, error) {
	text, err := call(ctx, l, func(l *link) (string, error) {
		return l.DomainGetXMLDesc(g.ref(), lv.DomainXMLMigratable)
	})
	if err != nil {
		return "", err
	}
	return balloon.ReplaceAllString(text, ""), nil
}

var errWithout = errors.New("the source runs it without libvirt; set hypervisor to the same on both hosts")

// parseOffer reads what another host says of a domain. Nothing in it is trusted
// to be right, nor to name a file that we should read.
func parseOffer(data []byte) (*offer, *libvirtxml.Domain, error) {
	if of, ok := hypervisor.OfferedBy(data, maxOffer); ok && of != "libvirt" {
		return nil, nil, errWithout
	}
	var o offer
	if err := hypervisor.DecodeVersion(data, maxOffer, offerVersion, &o); err != nil {
		return nil, nil, err
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(o.XML); err != nil {
		return nil, nil, fmt.Errorf("domain XML: %w", err)
	}
	if err := nics.Check(o.Cards, func(mac string) bool { return hasCard(&x, mac) }); err != nil {
		return nil, nil, err
	}
	return &o, &x, nil
}

func hasCard(x *libvirtxml.Domain, mac string) bool {
	return x.Devices != nil && slices.ContainsFunc(x.Devices.Interfaces, func(i libvirtxml.DomainInterface) bool {
		return i.MAC != nil && strings.EqualFold(i.MAC.Address, mac)
	})
}
