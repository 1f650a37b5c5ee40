package main

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"
)

// events is go test -json of four packages: one passes with tests skipped, one
// fails and panics, one has no tests, and one does not compile.
func events(t *testing.T) *bytes.Reader {
	t.Helper()
	b, err := os.ReadFile("testdata/events.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.NewReader(b)
}

func TestRender(t *testing.T) {
	var out strings.Builder
	if err := render(&out, events(t)); err != nil {
		t.Fatal(err)
	}
	want := `ok  	example.org/sample/a	(cached)
# example.org/sample/d [example.org/sample/d.test]
d/d.go:2:12: undefined: undefined
?   	example.org/sample/c	[no test files]
FAIL	example.org/sample/d [build failed]
    b_test.go:3: before
printed
    b_test.go:3: got 1, want 2
        and more
--- FAIL: TestBad/sub (0.00s)
--- FAIL: TestBad (0.00s)
--- FAIL: TestPanic (0.00s)
panic: boom [recovered, repanicked]
FAIL	example.org/sample/b	0.006s
FAIL
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
}

// What is no event is not lost, and a log that was cut off is no error.
func TestRenderOtherLines(t *testing.T) {
	in := "go: downloading x\n" + `{"Action":"output","Package":"p","Output":"ok  \tp\t1s\n"}` + "\n" +
		`{"Action":"pass","Package":"p"}` + "\n" + `{"Action":"out`
	var out strings.Builder
	if err := render(&out, strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	if want := "go: downloading x\nok  \tp\t1s\n{\"Action\":\"out\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestTally(t *testing.T) {
	tally, err := tallyOf(events(t))
	if err != nil {
		t.Fatal(err)
	}
	want := "tests: 4 passed, 2 failed, 1 package(s) failed as a whole; " +
		"1 on real KVM, 1 under TCG, 1 with dirty page tracking, 0 with QEMU 10, 0 with libvirt 11; " +
		"2 skipped: do not feel like it (1), machine lacks KVM (1)"
	if got := tally.line(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	lines := []string{
		"skipped: example.org/sample/a.TestRaw: do not feel like it",
		"skipped: example.org/sample/a.TestTable/two: this machine lacks KVM: no such file",
	}
	if got := tally.skipLines(); !slices.Equal(got, lines) {
		t.Errorf("skipped: %q", got)
	}
	lines = []string{
		"failed: example.org/sample/b.TestBad",
		"    b_test.go:3: before",
		"failed: example.org/sample/b.TestBad/sub",
		"    b_test.go:3: got 1, want 2",
		"failed: example.org/sample/b.TestPanic",
		"failed as a whole: example.org/sample/d",
	}
	if got := tally.failLines(); !slices.Equal(got, lines) {
		t.Errorf("failed: %q", got)
	}
	lines = []string{
		"not allowed in CI: example.org/sample/a.TestRaw was skipped for what the machine could have: do not feel like it",
	}
	if got := tally.objections(); !slices.Equal(got, lines) {
		t.Errorf("objections: %q", got)
	}
}

// A process that ends in the middle of a test is told of with its last words.
func TestTallyOfTheEnded(t *testing.T) {
	in := `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"panic: test timed out after 1s\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t1.0s\n"}
{"Action":"fail","Package":"p"}
`
	tally, err := tallyOf(strings.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"never ended: p.TestA", "failed as a whole: p: panic: test timed out after 1s"}
	if got := tally.failLines(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A run in which nothing ran on KVM is no CI run, unless the machine has none.
func TestObjectionsToNothing(t *testing.T) {
	const passed = `{"Action":"pass","Package":"p","Test":"TestA"}` + "\n"
	const lacks = `{"Action":"attr","Package":"p","Test":"TestK","Key":"lmctl.lacks","Value":"KVM"}` + "\n" +
		`{"Action":"skip","Package":"p","Test":"TestK"}` + "\n"
	for in, want := range map[string]int{"": 3, passed: 3, passed + lacks: 2} {
		tally, err := tallyOf(strings.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		if got := tally.objections(); len(got) != want {
			t.Errorf("%d objections to %q, want %d: %q", len(got), in, want, got)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"run"}, {"run", "--", "./..."}, {"summary"}, {"other", "x"}} {
		if status, err := command(args); status != 2 || err == nil {
			t.Errorf("%q: status %d, %v", args, status, err)
		}
	}
	if status, err := command([]string{"summary", t.TempDir() + "/none"}); status != 1 || err == nil {
		t.Errorf("no log: status %d, %v", status, err)
	}
}
