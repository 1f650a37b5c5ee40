package libvirt

import (
	"encoding/json"
	"strings"
	"testing"
)

func validOffer(t testing.TB, change func(map[string]any)) []byte {
	t.Helper()
	b, err := json.Marshal(offer{Version: offerVersion, Hypervisor: "libvirt", XML: runningDomain, Cookie: []byte("<cookie/>"), QEMU: 7002022, Libvirt: 9000000, PageSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	if change == nil {
		return b
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	if b, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseOffer(t *testing.T) {
	o, x, err := parseOffer(validOffer(t, nil))
	if err != nil || x.Name != "web" || o.QEMU != 7002022 {
		t.Fatalf("%+v, %v", o, err)
	}
	for want, text := range map[string][]byte{
		"version 9":       validOffer(t, func(m map[string]any) { m["version"] = 9 }),
		"unknown field":   validOffer(t, func(m map[string]any) { m["teleport"] = true }),
		"without libvirt": validOffer(t, func(m map[string]any) { m["hypervisor"] = "qemu" }),
		"address 224.0.0.1": validOffer(t, func(m map[string]any) {
			m["cards"] = map[string]any{"52:54:00:12:34:56": map[string]any{"addresses": []string{"224.0.0.1"}}}
		}),
		"a card":                validOffer(t, func(m map[string]any) { m["cards"] = map[string]any{"52:54:00:00:00:01": map[string]any{}} }),
		"run the same lmctl":    validOffer(t, func(m map[string]any) { m["version"], m["of later versions"] = offerVersion+1, true }),
		"domain XML":            validOffer(t, func(m map[string]any) { m["xml"] = "<domain" }),
		"something follows":     append(validOffer(t, nil), '1'),
		"more than":             []byte(strings.Repeat(" ", maxOffer+1)),
		"unexpected end of JSO": []byte("{"),
	} {
		if _, _, err := parseOffer(text); err == nil || !strings.Contains(strings.ReplaceAll(err.Error(), "unexpected EOF", "unexpected end of JSON"), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func FuzzParseOffer(f *testing.F) {
	f.Add(validOffer(f, nil))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if o, x, err := parseOffer(text); err == nil && (o == nil || x == nil) {
			t.Error("neither an offer nor an error")
		}
	})
}
