package packaging

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/lmctl/lmctl/internal/agent"
)

// setting is a line of agent.yaml that is commented out and would be a setting:
// "#key: value", and within a mapping "#  key: value" or "#  # why".
var setting = regexp.MustCompile(`(?m)^#((?:  )?(?:[a-z_]+:|  # ))`)

// uncommented is agent.yaml with every setting in force.
func uncommented(text []byte) []byte {
	text = regexp.MustCompile(`(?m)^#(  # .*)$`).ReplaceAll(text, []byte("$1"))
	return setting.ReplaceAll(text, []byte("$1"))
}

func readConfig(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile("agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The file as it is installed changes nothing, and the values that it shows are
// the defaults.
func TestConfigShowsTheDefaults(t *testing.T) {
	text := readConfig(t)
	want, err := agent.DefaultConfig()
	if err != nil {
		t.Fatal(err)
	}
	got, err := agent.ParseConfig(text)
	if err != nil {
		t.Fatalf("as it is installed: %v", err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("as it is installed it changes the defaults:\n%+v\n%+v", got, want)
	}
	if got, err = agent.ParseConfig(uncommented(text)); err != nil {
		t.Fatalf("with every key in force: %v\n%s", err, uncommented(text))
	}
	want.Name = "host1" // the default is the machine's own
	if !reflect.DeepEqual(got, want) {
		t.Errorf("what it shows are not the defaults:\n%+v\n%+v", got, want)
	}
}

// Every key that the agent knows is shown, in the place where it belongs.
func TestConfigShowsEveryKey(t *testing.T) {
	var shown map[string]any
	if err := yaml.Unmarshal(uncommented(readConfig(t)), &shown); err != nil {
		t.Fatal(err)
	}
	checkKeys(t, "", reflect.TypeFor[agent.Config](), shown)
}

func checkKeys(t *testing.T, prefix string, typ reflect.Type, shown map[string]any) {
	t.Helper()
	for field := range typ.Fields() {
		key, _, _ := strings.Cut(field.Tag.Get("yaml"), ",")
		value, found := shown[key]
		if !found {
			t.Errorf("%s%s is not in agent.yaml", prefix, key)
			continue
		}
		if inner, ok := value.(map[string]any); ok && field.Type.Kind() == reflect.Struct {
			checkKeys(t, prefix+key+".", field.Type, inner)
		}
	}
}
