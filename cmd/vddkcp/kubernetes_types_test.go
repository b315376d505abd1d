package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// The types below have the fields of k8s.io/api that the tests of the examples
// use, under the same names. testtools/kubedecode, which has the real types,
// refuses unknown and misplaced fields before these types are decoded.

type kubeMeta struct {
	Name string `json:"name"`
}

type kubeConfigMap struct {
	kubeMeta `json:"metadata"`
	Data     map[string]string `json:"data"`
}

type kubeClaim struct {
	kubeMeta `json:"metadata"`
	Spec     struct {
		AccessModes []string `json:"accessModes"`
	} `json:"spec"`
}

type kubeJob struct {
	Spec struct {
		CompletionMode       *string               `json:"completionMode"`
		Completions          *int32                `json:"completions"`
		Parallelism          *int32                `json:"parallelism"`
		BackoffLimit         *int32                `json:"backoffLimit"`
		BackoffLimitPerIndex *int32                `json:"backoffLimitPerIndex"`
		PodReplacementPolicy *string               `json:"podReplacementPolicy"`
		PodFailurePolicy     *kubePodFailurePolicy `json:"podFailurePolicy"`
		Template             struct {
			Spec kubePodSpec `json:"spec"`
		} `json:"template"`
	} `json:"spec"`
}

type kubePodFailurePolicy struct {
	Rules []struct {
		Action      string `json:"action"`
		OnExitCodes *struct {
			ContainerName *string `json:"containerName"`
			Operator      string  `json:"operator"`
			Values        []int32 `json:"values"`
		} `json:"onExitCodes"`
		OnPodConditions []struct {
			Type   string `json:"type"`
			Status string `json:"status"`
		} `json:"onPodConditions"`
	} `json:"rules"`
}

type kubePodSpec struct {
	RestartPolicy                 string                  `json:"restartPolicy"`
	TerminationGracePeriodSeconds *int64                  `json:"terminationGracePeriodSeconds"`
	AutomountServiceAccountToken  *bool                   `json:"automountServiceAccountToken"`
	HostNetwork                   bool                    `json:"hostNetwork"`
	HostPID                       bool                    `json:"hostPID"`
	HostIPC                       bool                    `json:"hostIPC"`
	SecurityContext               *kubePodSecurityContext `json:"securityContext"`
	Volumes                       []kubeVolume            `json:"volumes"`
	InitContainers                []kubeContainer         `json:"initContainers"`
	Containers                    []kubeContainer         `json:"containers"`
}

type kubePodSecurityContext struct {
	RunAsNonRoot   *bool               `json:"runAsNonRoot"`
	RunAsUser      *int64              `json:"runAsUser"`
	RunAsGroup     *int64              `json:"runAsGroup"`
	FSGroup        *int64              `json:"fsGroup"`
	SeccompProfile *kubeSeccompProfile `json:"seccompProfile"`
}

type kubeSeccompProfile struct {
	Type string `json:"type"`
}

type kubeContainer struct {
	Name            string               `json:"name"`
	Image           string               `json:"image"`
	Command         []string             `json:"command"`
	Args            []string             `json:"args"`
	Env             []kubeEnvVar         `json:"env"`
	EnvFrom         []any                `json:"envFrom"`
	VolumeMounts    []kubeVolumeMount    `json:"volumeMounts"`
	SecurityContext *kubeSecurityContext `json:"securityContext"`
	Resources       struct {
		Requests kubeResources `json:"requests"`
		Limits   kubeResources `json:"limits"`
	} `json:"resources"`
}

type kubeSecurityContext struct {
	AllowPrivilegeEscalation *bool               `json:"allowPrivilegeEscalation"`
	ReadOnlyRootFilesystem   *bool               `json:"readOnlyRootFilesystem"`
	Privileged               *bool               `json:"privileged"`
	RunAsNonRoot             *bool               `json:"runAsNonRoot"`
	RunAsUser                *int64              `json:"runAsUser"`
	SeccompProfile           *kubeSeccompProfile `json:"seccompProfile"`
	Capabilities             *struct {
		Add  []string `json:"add"`
		Drop []string `json:"drop"`
	} `json:"capabilities"`
}

type kubeEnvVar struct {
	Name      string `json:"name"`
	Value     string `json:"value"`
	ValueFrom any    `json:"valueFrom"`
}

type kubeVolumeMount struct {
	Name      string `json:"name"`
	MountPath string `json:"mountPath"`
	ReadOnly  bool   `json:"readOnly"`
}

type kubeVolume struct {
	Name      string `json:"name"`
	ConfigMap *struct {
		Name        string `json:"name"`
		DefaultMode *int32 `json:"defaultMode"`
	} `json:"configMap"`
	Secret *struct {
		SecretName  string          `json:"secretName"`
		DefaultMode *int32          `json:"defaultMode"`
		Items       []kubeKeyToPath `json:"items"`
	} `json:"secret"`
	PersistentVolumeClaim *struct {
		ClaimName string `json:"claimName"`
	} `json:"persistentVolumeClaim"`
	EmptyDir *struct{} `json:"emptyDir"`
}

type kubeKeyToPath struct {
	Key  string `json:"key"`
	Path string `json:"path"`
}

// kubeResources are amounts of resources.
type kubeResources struct {
	CPU    kubeQuantity `json:"cpu"`
	Memory kubeQuantity `json:"memory"`
}

// kubeQuantity is an amount in the notation of Kubernetes: 0.1 is "100m".
type kubeQuantity float64

func (q kubeQuantity) MarshalJSON() ([]byte, error) {
	return json.Marshal(strconv.FormatFloat(float64(q), 'g', -1, 64))
}

func (q *kubeQuantity) UnmarshalJSON(text []byte) error {
	var s string
	if err := json.Unmarshal(text, &s); err != nil {
		return err
	}
	unit := 1.0
	for suffix, value := range map[string]float64{"m": 1e-3, "Mi": 1 << 20, "Gi": 1 << 30} {
		if number, ok := strings.CutSuffix(s, suffix); ok {
			s, unit = number, value
			break
		}
	}
	n, err := strconv.ParseFloat(s, 64)
	*q = kubeQuantity(n * unit)
	return err
}

// isDNSLabel reports whether a name is a label by RFC 1123, which the names of
// volumes must be.
func isDNSLabel(name string) bool {
	return len(name) <= 63 && regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`).MatchString(name)
}

// manifests decodes the YAML documents of Kubernetes objects, as strictly as an API
// server does that refuses unknown and duplicate fields. The objects are a
// *kubeConfigMap, a *kubeClaim or a *kubeJob each.
func manifests(t *testing.T, text string) (objects []any, err error) {
	t.Helper()
	cmd := exec.Command(testTool(t, "kubedecode"))
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(text), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, errors.New(strings.TrimSpace(stderr.String()))
	}
	var all []json.RawMessage
	if err := json.Unmarshal(stdout.Bytes(), &all); err != nil {
		return nil, err
	}
	for _, one := range all {
		var kind struct{ Kind string }
		if err := json.Unmarshal(one, &kind); err != nil {
			return nil, err
		}
		var object any
		switch kind.Kind {
		case "ConfigMap":
			object = new(kubeConfigMap)
		case "PersistentVolumeClaim":
			object = new(kubeClaim)
		case "Job":
			object = new(kubeJob)
		default:
			return nil, fmt.Errorf("an object of kind %q", kind.Kind)
		}
		if err := json.Unmarshal(one, object); err != nil {
			return nil, err
		}
		objects = append(objects, object)
	}
	return objects, nil
}
